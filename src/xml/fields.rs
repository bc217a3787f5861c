//! Takes an element apart by name, and refuses by name what nobody took.
//!
//! A reader asks for everything that it understands and then calls [`Fields::finish`]; whatever is
//! left over is not supported. So nothing in a document is ever ignored by oversight, and the
//! refusal can list what would have been understood.

use std::fmt;
use std::ops::RangeInclusive;

use super::error::{At, Clipped, Error, Place, Shown};
use super::tree::{Attribute, Element};
use crate::model::Name;

/// An element of which parts were taken.
pub(super) struct Fields<'a> {
    element: Element<'a>,
    known_attributes: Vec<&'static str>,
    known_children: Vec<&'static str>,
    takes_text: bool,
}

/// The text of an attribute or of an element, to be made something of.
pub(super) struct Value {
    /// What to call it: `type= in <disk>`, `<name>`.
    what: String,
    pub(super) text: String,
    pub(super) place: Place,
}

impl<'a> Fields<'a> {
    pub(super) fn of(element: Element<'a>) -> Self {
        Self {
            element,
            known_attributes: Vec::new(),
            known_children: Vec::new(),
            takes_text: false,
        }
    }

    /// The root of a document, which must be called `name`.
    pub(super) fn of_root(root: Element<'a>, name: &str) -> Result<Self, Error> {
        if root.name != name {
            return Err(root.place.refuse(format!(
                "the document is a <{}>, and a <{name}> is needed here",
                Clipped(root.name)
            )));
        }
        Ok(Self::of(root))
    }

    pub(super) fn place(&self) -> Place {
        self.element.place
    }

    /// An attribute, if it is there.
    pub(super) fn attribute(&mut self, name: &'static str) -> Option<Value> {
        self.known_attributes.push(name);
        let all = &mut self.element.attributes;
        let at = all.iter().position(|a| a.name == name)?;
        let Attribute { value, place, .. } = all.remove(at);
        Some(Value {
            what: format!("{name}= in <{}>", self.element.name),
            text: value,
            place,
        })
    }

    /// An attribute that must be there.
    pub(super) fn required(&mut self, name: &'static str) -> Result<Value, Error> {
        let missing = format!("<{}> needs {name}=", self.element.name);
        let place = self.place();
        self.attribute(name).ok_or_else(|| place.refuse(missing))
    }

    /// A child, if it is there; it must be there once only.
    pub(super) fn child(&mut self, name: &'static str) -> Result<Option<Element<'a>>, Error> {
        self.known_children.push(name);
        let parent = self.element.name;
        let all = &mut self.element.children;
        let Some(at) = all.iter().position(|c| c.name == name) else {
            return Ok(None);
        };
        let child = all.remove(at);
        match all.iter().find(|c| c.name == name) {
            None => Ok(Some(child)),
            Some(second) => Err(second.place.refuse(format!(
                "<{name}> given twice in <{parent}>, first on line {}",
                child.place.line
            ))),
        }
    }

    /// All children of one name, of which there must be one at least.
    pub(super) fn children(&mut self, name: &'static str) -> Result<Vec<Element<'a>>, Error> {
        self.known_children.push(name);
        let all = std::mem::take(&mut self.element.children);
        let (taken, left) = all.into_iter().partition(|c| c.name == name);
        self.element.children = left;
        let taken: Vec<_> = taken;
        if taken.is_empty() && self.element.children.is_empty() {
            return Err(self.place().refuse(format!(
                "<{0}> has no <{name}>; leave <{0}> out to mean all",
                self.element.name
            )));
        }
        Ok(taken)
    }

    /// The text of a child that holds nothing else, if it is there.
    pub(super) fn child_text(&mut self, name: &'static str) -> Result<Option<Value>, Error> {
        let Some(child) = self.child(name)? else {
            return Ok(None);
        };
        let mut fields = Fields::of(child);
        let text = fields.text();
        fields.finish()?;
        Ok(Some(text))
    }

    /// The element's own text.
    pub(super) fn text(&mut self) -> Value {
        self.takes_text = true;
        Value {
            what: format!("<{}>", self.element.name),
            text: std::mem::take(&mut self.element.text),
            place: self.place(),
        }
    }

    /// Refuses an attribute that is known but out of place here: `why` goes on after its name.
    pub(super) fn no_attribute(&self, name: &str, why: &str) -> Result<(), Error> {
        match self.element.attributes.iter().find(|a| a.name == name) {
            None => Ok(()),
            Some(a) => Err(a
                .place
                .refuse(format!("{name}= in <{}> {why}", self.element.name))),
        }
    }

    /// Refuses a child that is known but out of place here.
    pub(super) fn no_child(&self, name: &str, why: &str) -> Result<(), Error> {
        match self.element.children.iter().find(|c| c.name == name) {
            None => Ok(()),
            Some(c) => Err(c.place.refuse(format!("<{name}> {why}"))),
        }
    }

    /// Refuses what is left.
    pub(super) fn finish(self) -> Result<(), Error> {
        let Element {
            name,
            attributes,
            children,
            text,
            text_place,
            ..
        } = self.element;
        if let Some(left) = attributes.iter().find(|a| !a.is_idle()) {
            let known: Vec<_> = self
                .known_attributes
                .iter()
                .map(|a| format!("{a}="))
                .collect();
            return Err(left.place.refuse(format!(
                "not supported here: {}= in <{name}>; {}",
                Clipped(left.name),
                takes(&known, "no attributes")
            )));
        }
        if let Some(left) = children.first() {
            let known: Vec<_> = self
                .known_children
                .iter()
                .map(|c| format!("<{c}>"))
                .collect();
            return Err(left.place.refuse(format!(
                "not supported here: <{}> in <{name}>; {}",
                Clipped(left.name),
                takes(&known, "no elements")
            )));
        }
        match text_place {
            Some(place) if !self.takes_text => Err(place.refuse(format!(
                "text in <{name}>, which takes none: {}",
                Shown(text.trim())
            ))),
            _ => Ok(()),
        }
    }
}

fn takes(known: &[String], none: &str) -> String {
    match known {
        [] => format!("it takes {none}"),
        _ => format!("it takes {}", known.join(" ")),
    }
}

impl Value {
    /// A refusal of this value.
    pub(super) fn refuse(&self, why: impl fmt::Display) -> Error {
        let Self { what, text, place } = self;
        place.refuse(format!("{what} is {}: {why}", Shown(text)))
    }

    /// One of a few words.
    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Result<T, Error> {
        match words.iter().find(|(word, _)| *word == self.text) {
            Some(&(_, meaning)) => Ok(meaning),
            None => {
                let words: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
                Err(self.refuse(format!("only {} can stand here", words.join(" or "))))
            }
        }
    }

    /// A checkpoint's name.
    pub(super) fn name(self) -> Result<At<Name>, Error> {
        match Name::new(&self.text) {
            Ok(value) => Ok(At {
                value,
                place: self.place,
            }),
            Err(_) => Err(self.refuse(
                "a name has letters, digits, '_', '-' and, not first, '.'; at most 251; and not \
                 .xml at the end",
            )),
        }
    }

    /// A whole number.
    pub(super) fn number(&self, range: RangeInclusive<u64>) -> Result<u64, Error> {
        // parse() alone would take a plus sign.
        let digits = self.text.bytes().all(|b| b.is_ascii_digit());
        match self.text.parse() {
            Ok(n) if digits && range.contains(&n) => Ok(n),
            _ => Err(self.refuse(format!(
                "a whole number from {} to {} is needed",
                range.start(),
                range.end()
            ))),
        }
    }

    /// A name of another kind (a disk, a bitmap, an export) of at most `longest` bytes.
    pub(super) fn label(self, longest: usize) -> Result<String, Error> {
        if self.text.is_empty() || self.text.contains(char::is_control) {
            return Err(self.refuse("a name without control characters is needed"));
        }
        if self.text.len() > longest {
            return Err(self.refuse(format!("longer than {longest} bytes")));
        }
        Ok(self.text)
    }

    /// An absolute path of at most `longest` bytes.
    pub(super) fn path(self, longest: usize) -> Result<String, Error> {
        if !self.text.starts_with('/') || self.text.len() < 2 {
            return Err(self.refuse("an absolute path is needed"));
        }
        self.label(longest)
    }
}
