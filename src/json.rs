//! Texts in JSON documents.

use std::fmt::{self, Write};

/// Displays a text as a JSON string in quotes. JSON forbids control characters in strings: they become spaces.
pub(crate) struct JsonText<'a>(pub(crate) &'a str);

impl fmt::Display for JsonText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => {
                    f.write_char('\\')?;
                    f.write_char(c)?;
                }
                c if c.is_control() => f.write_char(' ')?,
                c => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    #[test]
    fn hostile_texts_stay_inside_their_string() {
        assert_eq!(JsonText("a\"},\\\n\u{7}ä").to_string(), r#""a\"},\\  ä""#);
    }
}
