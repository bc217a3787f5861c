//! Sizes as people write and read them: options, controls and tables share one notation.

/// What a size may look like, as the hint of a refusal.
pub const SIZES: &str = "write a number of bytes, or 500M, 10G, 2T";

/// Bytes, or with K, M, G, T, P the power of 1024; `None` if `text` is no size or one that no 64 bits
/// hold.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        _ => return None,
    };
    // A sign is no digit.
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Bytes in the largest unit that leaves a whole part, with one decimal: `1.5 MiB`.
pub fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let exponent = bytes.checked_ilog2().unwrap_or(0) / 10;
    let Some(unit) = exponent.checked_sub(1).and_then(|i| UNITS.get(i as usize)) else {
        return format!("{bytes} B");
    };
    // Cut, not rounded: a job that is nearly done is not shown as done.
    let tenths = (u128::from(bytes) * 10) >> (10 * exponent);
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("2k", 2048),
            ("50M", 50 << 20),
            ("3T", 3 << 40),
            ("1P", 1 << 50),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "+1",
            "1.5G",
            "1 G",
            "10X",
            "1MiB",
            "1é",
            "99999999P",
        ] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536 << 10, "1.5 MiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
    }
}
