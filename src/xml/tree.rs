//! From bytes to a tree of elements that know where they stand.
//!
//! quick-xml finds the markup; what it leaves to its users is checked here: characters, names,
//! references, the nesting. Nothing is ever expanded or fetched: a DOCTYPE is refused, and so is
//! every reference but those to characters and the five that XML itself defines. Size, depth and
//! the number of attributes are bounded, so that a hostile document costs little.

use std::borrow::Cow;

use quick_xml::Reader;
use quick_xml::errors::IllFormedError;
use quick_xml::events::attributes::{AttrError, Attributes};
use quick_xml::events::{BytesStart, Event};

use super::error::{Clipped, Error, Place, Shown};
use super::lexical::{attribute_value, is_name, is_xml_char, resolve};

/// The longest document, in bytes. A domain's XML is a few dozen KiB.
pub const MAX_BYTES: usize = 1 << 20;
/// The deepest nesting. A domain's XML takes about ten.
const MAX_DEPTH: usize = 64;
/// The most attributes on one element.
const MAX_ATTRIBUTES: usize = 64;

/// An element, its attributes and what is in it. Comments and processing instructions are gone.
#[derive(Debug)]
pub(super) struct Element<'a> {
    pub(super) name: &'a str,
    pub(super) place: Place,
    pub(super) attributes: Vec<Attribute<'a>>,
    pub(super) children: Vec<Element<'a>>,
    /// All its own text in one.
    pub(super) text: String,
    /// Where the first text that is not blank stands.
    pub(super) text_place: Option<Place>,
}

#[derive(Debug)]
pub(super) struct Attribute<'a> {
    pub(super) name: &'a str,
    pub(super) value: String,
    pub(super) place: Place,
}

impl Attribute<'_> {
    /// A declaration of namespaces that says nothing as long as no name has a prefix.
    pub(super) fn is_idle(&self) -> bool {
        self.name.starts_with("xmlns:") || (self.name == "xmlns" && self.value.is_empty())
    }
}

/// The text of a document: UTF-8 without a byte order mark, of characters that XML allows, lines
/// ended by `\n` alone.
pub(super) fn source(bytes: &[u8]) -> Result<Cow<'_, str>, Error> {
    let top = Place { line: 1, column: 1 };
    if bytes.len() > MAX_BYTES {
        return Err(top.refuse(format!(
            "the document is longer than {} KiB",
            MAX_BYTES >> 10
        )));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let sound = bytes.get(..e.valid_up_to()).unwrap_or_default();
        let sound = String::from_utf8_lossy(sound);
        Cursor::new(&sound)
            .place(sound.len())
            .refuse("the document is not UTF-8 here")
    })?;
    if let Some((at, c)) = text.char_indices().find(|&(_, c)| !is_xml_char(c)) {
        return Err(Cursor::new(text).place(at).refuse(format!(
            "the character U+{:04X} cannot stand in XML",
            u32::from(c)
        )));
    }
    Ok(if text.contains('\r') {
        Cow::Owned(text.replace("\r\n", "\n").replace('\r', "\n"))
    } else {
        Cow::Borrowed(text)
    })
}

/// The root element of a document whose text is from [`source`].
pub(super) fn parse(source: &str) -> Result<Element<'_>, Error> {
    let mut reader = Reader::from_str(source);
    let config = reader.config_mut();
    config.check_comments = true;
    // Done by end_tag(), which can say where the element was opened.
    config.check_end_names = false;
    config.allow_unmatched_ends = true;
    let mut builder = Builder {
        source,
        cursor: Cursor::new(source),
        open: Vec::new(),
        root: None,
    };
    loop {
        let before = offset(reader.buffer_position());
        match reader.read_event() {
            Ok(Event::Eof) => return builder.end(),
            Ok(event) => builder.event(event, before)?,
            Err(e) => {
                let place = builder.cursor.place(offset(reader.error_position()));
                return Err(ill_formed(place, markup_error(&e)));
            }
        }
    }
}

struct Builder<'a> {
    source: &'a str,
    cursor: Cursor<'a>,
    /// The elements that are not closed yet, outermost first.
    open: Vec<Element<'a>>,
    root: Option<Element<'a>>,
}

impl<'a> Builder<'a> {
    /// Takes in what stands at the offset `at`.
    fn event(&mut self, event: Event<'_>, at: usize) -> Result<(), Error> {
        let place = self.cursor.place(at);
        match event {
            Event::Start(tag) => self.start(&tag, at),
            Event::Empty(tag) => {
                self.start(&tag, at)?;
                self.close();
                Ok(())
            }
            Event::End(tag) => self.end_tag(tag.name().as_ref(), place),
            Event::Text(text) if text.contains("]]>") => {
                Err(ill_formed(place, "]]> in a text: write ]]&gt;"))
            }
            Event::Text(text) => {
                let blank = text.len() - text.trim_ascii_start().len();
                let place = self.cursor.place(at + blank);
                self.text(&text, place)
            }
            // Not even a blank one.
            Event::CData(_) | Event::GeneralRef(_) if self.open.is_empty() => Err(outside(place)),
            Event::CData(text) => self.text(&text, place),
            Event::GeneralRef(name) => {
                let c = resolve(&name).map_err(|reason| ill_formed(place, reason))?;
                self.text(c.encode_utf8(&mut [0; 4]), place)
            }
            Event::Comment(_) => Ok(()),
            Event::Decl(decl) if at == 0 => {
                // Behind `<?` stands `xml`.
                let found = Attributes::new(&decl, 3);
                let attributes = self.attributes(found, &decl, place, at + 1)?;
                declaration(&attributes, place)
            }
            Event::Decl(_) => Err(ill_formed(place, "<?xml …?> not at the very beginning")),
            Event::PI(pi) if is_name(pi.target()) && !pi.target().eq_ignore_ascii_case("xml") => {
                Ok(())
            }
            Event::PI(_) => Err(ill_formed(place, "a processing instruction without a name")),
            Event::DocType(_) => {
                Err(place.refuse("not supported here: <!DOCTYPE>; nor are entities"))
            }
            Event::Eof => Ok(()),
        }
    }

    fn start(&mut self, tag: &BytesStart<'_>, at: usize) -> Result<(), Error> {
        let place = self.cursor.place(at);
        // The event borrows from itself, not from the source: take its words from there.
        let inside = self.source.get(at + 1..).unwrap_or_default();
        let name = tag.name();
        let name = inside.get(..name.as_ref().len()).unwrap_or_default();
        if !is_name(name) {
            return Err(ill_formed(place, format!("{} is no name", Shown(name))));
        }
        if self.root.is_some() {
            return Err(ill_formed(
                place,
                format!("<{}> after the end of the document", Clipped(name)),
            ));
        }
        if self.open.len() == MAX_DEPTH {
            return Err(place.refuse(format!("elements nested deeper than {MAX_DEPTH}")));
        }
        let attributes = self.attributes(tag.attributes(), tag, place, at)?;
        self.open.push(Element {
            name,
            place,
            attributes,
            children: Vec::new(),
            text: String::new(),
            text_place: None,
        });
        Ok(())
    }

    /// The attributes in `tag`, which stands at `at` behind one character of markup.
    fn attributes(
        &mut self,
        mut found: Attributes<'_>,
        tag: &str,
        place: Place,
        at: usize,
    ) -> Result<Vec<Attribute<'a>>, Error> {
        let inside = self.source.get(at + 1..).unwrap_or_default();
        let mut attributes: Vec<Attribute<'a>> = Vec::new();
        // What quick-xml would do against duplicates takes quadratic time.
        for attribute in found.with_checks(false) {
            let attribute = attribute.map_err(|e| ill_formed(place, attribute_error(&e)))?;
            let key = attribute.key.as_ref();
            // Where the key stands in the tag: both are parts of one text.
            let key_at = (key.as_ptr() as usize).saturating_sub(tag.as_ptr() as usize);
            let key = inside.get(key_at..key_at + key.len()).unwrap_or_default();
            let place = self.cursor.place(at + 1 + key_at);
            let ahead = inside.get(..key_at).unwrap_or_default();
            let apart = ahead.ends_with(|c: char| c.is_ascii_whitespace());
            if !is_name(key) || !apart {
                let why = format!("{} is no attribute", Shown(key));
                return Err(ill_formed(place, why));
            }
            if attributes.iter().any(|a| a.name == key) {
                let why = format!("the attribute {}= given twice", Clipped(key));
                return Err(ill_formed(place, why));
            }
            if attributes.len() == MAX_ATTRIBUTES {
                let why = format!("more than {MAX_ATTRIBUTES} attributes in one element");
                return Err(place.refuse(why));
            }
            let value = attribute_value(&attribute.value).map_err(|e| ill_formed(place, e))?;
            attributes.push(Attribute {
                name: key,
                value,
                place,
            });
        }
        Ok(attributes)
    }

    fn end_tag(&mut self, name: &str, place: Place) -> Result<(), Error> {
        match self.open.last() {
            Some(open) if open.name == name => {
                self.close();
                Ok(())
            }
            Some(open) => Err(ill_formed(
                place,
                format!(
                    "</{}> where <{}> of line {} is to be closed",
                    Clipped(name),
                    Clipped(open.name),
                    open.place.line
                ),
            )),
            None => Err(ill_formed(
                place,
                format!("</{}> closes nothing", Clipped(name)),
            )),
        }
    }

    fn close(&mut self) {
        if let Some(element) = self.open.pop() {
            match self.open.last_mut() {
                Some(parent) => parent.children.push(element),
                None => self.root = Some(element),
            }
        }
    }

    fn text(&mut self, text: &str, place: Place) -> Result<(), Error> {
        let blank = text.bytes().all(|b| b.is_ascii_whitespace());
        match self.open.last_mut() {
            Some(element) => {
                element.text.push_str(text);
                if !blank && element.text_place.is_none() {
                    element.text_place = Some(place);
                }
                Ok(())
            }
            None if blank => Ok(()),
            None => Err(outside(place)),
        }
    }

    fn end(self) -> Result<Element<'a>, Error> {
        if let Some(open) = self.open.last() {
            return Err(ill_formed(
                open.place,
                format!("<{}> is never closed", Clipped(open.name)),
            ));
        }
        self.root.ok_or_else(|| {
            let top = Place { line: 1, column: 1 };
            top.refuse("the document is empty")
        })
    }
}

/// Can a document that is declared so be read?
fn declaration(attributes: &[Attribute<'_>], place: Place) -> Result<(), Error> {
    let mut rest = attributes
        .iter()
        .map(|a| (a.name, a.value.as_str()))
        .peekable();
    match rest.next() {
        Some(("version", "1.0")) => {}
        _ => return Err(place.refuse("<?xml …?> must begin with version=\"1.0\"")),
    }
    if let Some((_, encoding)) = rest.next_if(|a| a.0 == "encoding")
        && !encoding.eq_ignore_ascii_case("utf-8")
    {
        return Err(place.refuse("only encoding=\"UTF-8\" is supported"));
    }
    rest.next_if(|a| matches!(a, ("standalone", "yes" | "no")));
    match rest.next() {
        None => Ok(()),
        Some((name, _)) => Err(ill_formed(
            place,
            format!("{}= as it stands in <?xml …?>", Clipped(name)),
        )),
    }
}

fn ill_formed(place: Place, why: impl std::fmt::Display) -> Error {
    place.refuse(format!("not well-formed XML: {why}"))
}

fn outside(place: Place) -> Error {
    ill_formed(place, "text outside the document's element")
}

/// What quick-xml found, in words for those who wrote the document.
fn markup_error(error: &quick_xml::Error) -> String {
    use quick_xml::Error;
    match error {
        Error::IllFormed(IllFormedError::UnclosedReference) => {
            "& in a text: write &amp;".to_owned()
        }
        Error::IllFormed(IllFormedError::DoubleHyphenInComment) => "-- in a comment".to_owned(),
        Error::Syntax(e) => e.to_string(),
        e => e.to_string(),
    }
}

fn attribute_error(error: &AttrError) -> &'static str {
    match error {
        AttrError::ExpectedEq(_) | AttrError::ExpectedValue(_) => {
            "an attribute without a value: write name=\"value\""
        }
        AttrError::UnquotedValue(_) | AttrError::ExpectedQuote(..) => {
            "an attribute whose value is not in quotes"
        }
        AttrError::Duplicated(..) => "an attribute given twice",
    }
}

fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

/// Counts lines and columns up to offsets, each of which is at or after the one before.
struct Cursor<'a> {
    source: &'a str,
    at: usize,
    place: Place,
}

impl<'a> Cursor<'a> {
    fn new(source: &'a str) -> Self {
        Self {
            source,
            at: 0,
            place: Place { line: 1, column: 1 },
        }
    }

    fn place(&mut self, offset: usize) -> Place {
        if offset < self.at {
            *self = Self::new(self.source);
        }
        let offset = offset.min(self.source.len());
        for byte in self
            .source
            .as_bytes()
            .get(self.at..offset)
            .unwrap_or_default()
        {
            match byte {
                b'\n' => {
                    self.place.line += 1;
                    self.place.column = 1;
                }
                // The second and later bytes of a character.
                0x80..=0xbf => {}
                _ => self.place.column += 1,
            }
        }
        self.at = offset;
        self.place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(element: &Element<'_>, out: &mut Vec<String>) {
        let at = |p: Place| format!("{}:{}", p.line, p.column);
        out.push(format!("{} {}", element.name, at(element.place)));
        for a in &element.attributes {
            out.push(format!("{}={} {}", a.name, a.value, at(a.place)));
        }
        if let Some(place) = element.text_place {
            out.push(format!("{} {}", element.text.trim(), at(place)));
        }
        for child in &element.children {
            places(child, out);
        }
    }

    #[test]
    fn everything_knows_where_it_stands() {
        let text = "<?xml version='1.0'?>\r\n<!-- ä\n --><a\n  b='1'  ö='&lt;ä\n\t' >\n  \n words \
                    <c/><!-- -->more<d e = \"2\"/>\r</a >\n";
        let text = source(text.as_bytes()).unwrap();
        let mut found = Vec::new();
        places(&parse(&text).unwrap(), &mut found);
        assert_eq!(
            found,
            [
                "a 3:5",
                "b=1 4:3",
                "ö=<ä   4:10",
                "words more 7:2",
                "c 7:8",
                "d 7:24",
                "e=2 7:27"
            ]
        );
    }

    #[test]
    fn errors_too() {
        for (text, expected) in [
            (
                "<a>\n <b>\n  </a>",
                "3:3 not well-formed XML: </a> where <b> of line 2 is to be closed",
            ),
            (
                "<a\n b='&x;'/>",
                "2:2 not well-formed XML: the entity &x; is not known",
            ),
            (
                "<a>\n &x;</a>",
                "2:2 not well-formed XML: the entity &x; is not known",
            ),
            ("<a>\n<b></a>", "2:4 not well-formed XML: </a> where"),
            ("<a/>\n\n x", "3:2 not well-formed XML: text outside"),
            ("<a>\u{1}</a>", "1:4 the character U+0001"),
            (
                "<!-- ä --><!DOCTYPE a>",
                "1:11 not supported here: <!DOCTYPE>",
            ),
        ] {
            let error = source(text.as_bytes())
                .and_then(|text| parse(&text).map(drop))
                .unwrap_err();
            let Place { line, column } = error.place;
            let found = format!("{line}:{column} {}", error.reason);
            assert!(found.starts_with(expected), "{found}");
        }
    }
}
