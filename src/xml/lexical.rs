//! Characters, names and references: the rules of XML 1.0 that quick-xml leaves to its users.

use super::error::Clipped;

/// An attribute's value with its references resolved and its line ends and tabs as blanks.
pub(super) fn attribute_value(raw: &str) -> Result<String, String> {
    if raw.contains('<') {
        return Err("< in an attribute: write &lt;".to_owned());
    }
    let mut value = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((text, reference)) = rest.split_once('&') {
        let (name, after) = reference
            .split_once(';')
            .ok_or("& in an attribute: write &amp;")?;
        value.push_str(&text.replace(['\n', '\t'], " "));
        value.push(resolve(name)?);
        rest = after;
    }
    value.push_str(&rest.replace(['\n', '\t'], " "));
    Ok(value)
}

/// What `&name;` stands for.
pub(super) fn resolve(name: &str) -> Result<char, String> {
    let code = match name {
        "lt" => return Ok('<'),
        "gt" => return Ok('>'),
        "amp" => return Ok('&'),
        "quot" => return Ok('"'),
        "apos" => return Ok('\''),
        _ => match (name.strip_prefix("#x"), name.strip_prefix('#')) {
            (Some(hex), _) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u32::from_str_radix(hex, 16).ok()
            }
            (None, Some(number)) if number.bytes().all(|b| b.is_ascii_digit()) => {
                number.parse().ok()
            }
            (None, None) => {
                return Err(format!(
                    "the entity &{}; is not known; there are &lt; &gt; &amp; &quot; &apos; and \
                     character numbers",
                    Clipped(name)
                ));
            }
            _ => None,
        },
    };
    code.and_then(char::from_u32)
        .filter(|&c| is_xml_char(c))
        .ok_or_else(|| format!("&{}; is no character of XML", Clipped(name)))
}

/// Can XML 1.0 hold this character at all?
pub(super) fn is_xml_char(c: char) -> bool {
    match c {
        '\t' | '\n' | '\r' => true,
        c => c >= ' ' && !matches!(c, '\u{fffe}' | '\u{ffff}'),
    }
}

/// Is this a name by XML 1.0, fifth edition, productions 4 to 5? It may have a prefix.
pub(super) fn is_name(text: &str) -> bool {
    match text.split_once(':') {
        Some((prefix, name)) => is_plain_name(prefix) && is_plain_name(name),
        None => is_plain_name(text),
    }
}

fn is_plain_name(text: &str) -> bool {
    let start = |c: char| {
        matches!(c, '_' | 'a'..='z' | 'A'..='Z' | '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}'
            | '\u{f8}'..='\u{2ff}' | '\u{370}'..='\u{37d}' | '\u{37f}'..='\u{1fff}'
            | '\u{200c}' | '\u{200d}' | '\u{2070}'..='\u{218f}' | '\u{2c00}'..='\u{2fef}'
            | '\u{3001}'..='\u{d7ff}' | '\u{f900}'..='\u{fdcf}' | '\u{fdf0}'..='\u{fffd}'
            | '\u{10000}'..='\u{effff}')
    };
    let more = |c: char| {
        matches!(c, '-' | '.' | '0'..='9' | '\u{b7}' | '\u{300}'..='\u{36f}'
            | '\u{203f}' | '\u{2040}')
    };
    let mut chars = text.chars();
    chars.next().is_some_and(start) && chars.all(|c| start(c) || more(c))
}
