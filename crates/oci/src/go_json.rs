//! JSON exactly as Go's `encoding/json` writes it, and serde helpers for what Go tolerates.
//!
//! The Go snapshotter decodes and re-encodes a SOCI index before it stores it under its original
//! digest, so a document that differs from Go's compact encoding in one byte is lost. With struct
//! fields in Go's order and sorted maps, the only difference between serde_json and Go is Go's
//! escaping of characters that are unsafe inside HTML.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::ser::Formatter;

/// The compact encoding of `value`.
pub(crate) fn to_bytes<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, GoFormatter);
    value
        .serialize(&mut serializer)
        .expect("writing to a Vec cannot fail, and all our maps have string keys");
    bytes
}

struct GoFormatter;

impl Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut plain_from = 0;
        for (at, unsafe_char) in fragment.match_indices(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            writer.write_all(&fragment.as_bytes()[plain_from..at])?;
            for char in unsafe_char.chars() {
                write!(writer, "\\u{:04x}", u32::from(char))?;
            }
            plain_from = at + unsafe_char.len();
        }
        writer.write_all(&fragment.as_bytes()[plain_from..])
    }
}

/// Reads `null` as the empty value, as Go does for slices, maps and strings.
pub(crate) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads an optional text; the empty one means absent, as Go's `omitempty` makes it.
pub(crate) fn empty_as_none<'de, D>(deserializer: D) -> Result<Option<String>, D::Error>
where
    D: Deserializer<'de>,
{
    Ok(Option::<String>::deserialize(deserializer)?.filter(|text| !text.is_empty()))
}

/// Writes bytes as padded standard base64, Go's form of `[]byte`.
pub(crate) fn base64_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

/// Reads padded standard base64 or `null`.
pub(crate) fn bytes_from_base64<'de, D>(deserializer: D) -> Result<Vec<u8>, D::Error>
where
    D: Deserializer<'de>,
{
    let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(String::from_utf8(super::to_bytes(&text)).unwrap(), expected);
    }

    #[test]
    fn strings_are_escaped_as_go_does() {
        check("plain", r#""plain""#);
        check("<a href=\"x\">&</a>", r#""\u003ca href=\"x\"\u003e\u0026\u003c/a\u003e""#);
        check("a\u{2028}b\u{2029}", r#""a\u2028b\u2029""#);
        check("\u{8}\u{c}\n\r\t\u{1}\u{1f}\u{7f}\\", "\"\\b\\f\\n\\r\\t\\u0001\\u001f\u{7f}\\\\\"");
        check("späß 🎈", "\"späß 🎈\"");
    }

    #[test]
    fn keys_are_escaped_too_and_nothing_is_indented() {
        let map = BTreeMap::from([("b>", vec![1, 2]), ("a&", vec![])]);
        assert_eq!(super::to_bytes(&map), br#"{"a\u0026":[],"b\u003e":[1,2]}"#);
    }
}
