//! The values of settings in files and in the environment.

use std::{fmt, time::Duration};

use http::StatusCode;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};

use crate::redact;

/// A single value in the form in which it was written.
///
/// `Display` prints the value itself, which may contain secrets. `Debug` prints it without them, and at most 256 bytes.
#[derive(Clone, PartialEq)]
pub enum SettingValue {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction.
    Float(f64),
    /// A text, also that of a duration or a word.
    Text(String),
    /// The items of a list, separated by commas.
    List(String),
}

impl SettingValue {
    /// Returns the value without secrets, at most 256 bytes of it.
    pub(super) fn redacted(&self) -> String {
        match self {
            Self::Text(text) | Self::List(text) => redact::value(text),
            value => value.to_string(),
        }
    }

    /// Returns whether the text of the value is equal to this text. Does not copy the value.
    pub(super) fn is_written(&self, text: &str) -> bool {
        match self {
            Self::Text(own) | Self::List(own) => own == text,
            value => value.to_string() == text,
        }
    }
}

impl fmt::Debug for SettingValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl fmt::Display for SettingValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Text(value) | Self::List(value) => value.fmt(f),
        }
    }
}

impl Serialize for SettingValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Float(value) => serializer.serialize_f64(*value),
            Self::Text(value) | Self::List(value) => serializer.serialize_str(value),
        }
    }
}

/// The conversion between the type of a setting and a [`SettingValue`].
pub(super) trait Setting: Sized {
    /// The form of a valid value, as errors state it after "use".
    const FORM: &'static str;

    fn read(value: &SettingValue) -> Option<Self>;
    fn show(&self) -> SettingValue;
}

const OFF: &str = "off";

fn is_off(value: &SettingValue) -> bool {
    match value {
        SettingValue::Bool(on) => !on,
        SettingValue::Text(text) => matches!(text.trim(), "off" | "none"),
        _ => false,
    }
}

impl Setting for Duration {
    const FORM: &'static str = "a time such as 250ms, 1m 30s or, in seconds, 2.5";

    fn read(value: &SettingValue) -> Option<Self> {
        match value {
            SettingValue::Int(secs) => u64::try_from(*secs).ok().map(Self::from_secs),
            SettingValue::Float(secs) => Self::try_from_secs_f64(*secs).ok(),
            SettingValue::Text(text) => match text.trim().parse() {
                Ok(secs) => Self::try_from_secs_f64(secs).ok(),
                Err(_) => humantime::parse_duration(text.trim()).ok(),
            },
            SettingValue::Bool(_) | SettingValue::List(_) => None,
        }
    }

    fn show(&self) -> SettingValue {
        SettingValue::Text(humantime::format_duration(*self).to_string())
    }
}

impl<T: Setting> Setting for Option<T> {
    const FORM: &'static str = T::FORM;

    fn read(value: &SettingValue) -> Option<Self> {
        if is_off(value) { Some(None) } else { T::read(value).map(Some) }
    }

    fn show(&self) -> SettingValue {
        self.as_ref().map_or_else(|| SettingValue::Text(OFF.into()), Setting::show)
    }
}

impl Setting for bool {
    const FORM: &'static str = "true or false";

    fn read(value: &SettingValue) -> Option<Self> {
        match value {
            SettingValue::Bool(value) => Some(*value),
            SettingValue::Text(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    fn show(&self) -> SettingValue {
        SettingValue::Bool(*self)
    }
}

impl Setting for f64 {
    const FORM: &'static str = "a number such as 0.2";

    fn read(value: &SettingValue) -> Option<Self> {
        let number = match value {
            SettingValue::Int(value) => *value as Self,
            SettingValue::Float(value) => *value,
            SettingValue::Text(text) => text.trim().parse().ok()?,
            SettingValue::Bool(_) | SettingValue::List(_) => return None,
        };
        number.is_finite().then_some(number)
    }

    fn show(&self) -> SettingValue {
        SettingValue::Float(*self)
    }
}

impl Setting for String {
    const FORM: &'static str = "a text";

    fn read(value: &SettingValue) -> Option<Self> {
        let is_list = matches!(value, SettingValue::List(_));
        Some(value.to_string()).filter(|text| !is_list && !text.is_empty())
    }

    fn show(&self) -> SettingValue {
        SettingValue::Text(self.clone())
    }
}

/// Reads a list of a file, or a text such as `429, 529`.
impl Setting for Vec<StatusCode> {
    const FORM: &'static str = "HTTP statuses such as 429, 529, or off";

    fn read(value: &SettingValue) -> Option<Self> {
        if is_off(value) || matches!(value, SettingValue::List(items) if items.is_empty()) {
            return Some(Self::new());
        }
        value.to_string().split(',').map(|status| status.trim().parse().ok()).collect()
    }

    fn show(&self) -> SettingValue {
        let texts: Vec<_> = self.iter().map(StatusCode::as_str).collect();
        SettingValue::Text(if texts.is_empty() { OFF.to_owned() } else { texts.join(", ") })
    }
}

macro_rules! whole_numbers {
    ($($Type:ty),*) => {$(
        impl Setting for $Type {
            const FORM: &'static str = "a whole number, 0 or more";

            fn read(value: &SettingValue) -> Option<Self> {
                match value {
                    SettingValue::Int(value) => (*value).try_into().ok(),
                    SettingValue::Text(text) => text.trim().parse().ok(),
                    _ => None,
                }
            }

            fn show(&self) -> SettingValue {
                i64::try_from(*self).map_or_else(|_| SettingValue::Text(self.to_string()), SettingValue::Int)
            }
        }
    )*};
}
whole_numbers!(u16, u32, u64, usize);

// ===== Tables of values =====

/// The content of a file: a table of values and tables.
#[derive(Clone, PartialEq)]
pub(super) enum Tree {
    Leaf(SettingValue),
    Table(Vec<(String, Tree)>),
}

impl Tree {
    /// Returns every value with its path, such as `retry_attempts` for `attempts` in the table `retry`.
    pub(super) fn flat(self) -> Vec<(String, SettingValue)> {
        let (mut open, mut flat) = (vec![(String::new(), self)], Vec::new());
        while let Some((path, tree)) = open.pop() {
            match tree {
                Self::Leaf(value) => flat.push((path, value)),
                Self::Table(table) => open.extend(table.into_iter().rev().map(|(key, tree)| {
                    let path = if path.is_empty() { key } else { format!("{path}_{key}") };
                    (path, tree)
                })),
            }
        }
        flat
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Tree;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of settings, a value or a list of values")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
                Ok(Tree::Leaf(SettingValue::Bool(value)))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
                Ok(Tree::Leaf(SettingValue::Int(value)))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
                let value = i64::try_from(value)
                    .map_or_else(|_| SettingValue::Text(value.to_string()), SettingValue::Int);
                Ok(Tree::Leaf(value))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
                Ok(Tree::Leaf(SettingValue::Float(value)))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Tree, E> {
                Ok(Tree::Leaf(SettingValue::Text(value.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
                let mut texts = Vec::new();
                while let Some(item) = items.next_element()? {
                    let Tree::Leaf(item) = item else {
                        return Err(A::Error::custom("a list must not contain a table"));
                    };
                    texts.push(item.to_string());
                }
                Ok(Tree::Leaf(SettingValue::List(texts.join(", "))))
            }

            /// Reads the `null` of JSON as `off`.
            fn visit_unit<E>(self) -> Result<Tree, E> {
                Ok(Tree::Leaf(SettingValue::Text(OFF.to_owned())))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
                let mut table = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    table.push(entry);
                }
                Ok(Tree::Table(table))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn config_times_are_text_or_seconds() {
        let text = |text: &str| Duration::read(&SettingValue::Text(text.into()));
        for (written, millis) in
            [("250ms", 250), ("2s", 2000), ("1m 30s", 90_000), ("2.5", 2500), (" 3 ", 3000)]
        {
            assert_eq!(text(written), Some(Duration::from_millis(millis)), "{written}");
        }
        for written in ["", "-1", "soon", "1e400", "NaN", "inf", "-0.5s", "99999999999999999999y"] {
            assert_eq!(text(written), None, "{written}");
        }
        for number in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
            assert_eq!(Duration::read(&SettingValue::Float(number)), None);
        }
        assert_eq!(Duration::read(&SettingValue::Int(-1)), None);
        assert_eq!(Option::<Duration>::read(&SettingValue::Text("off".into())), Some(None));
        let odd = Duration::new(90, 250_000_001);
        assert_eq!(Duration::read(&odd.show()), Some(odd), "as it is shown it can be read");
    }

    proptest! {
        #[test]
        fn fuzz_any_time_is_read_or_rejected(text in "(-?[0-9.]{0,22}(e[0-9]{1,3})? ?[a-zA-Zµ]{0,7} ?){0,4}|.{0,20}") {
            if let Some(time) = Duration::read(&SettingValue::Text(text)) {
                prop_assert_eq!(Duration::read(&time.show()), Some(time));
            }
        }

        #[test]
        fn fuzz_any_value_is_read_as_it_is_shown(
            time in any::<Duration>(), number in any::<u64>(), share in any::<f64>(),
        ) {
            prop_assert_eq!(Duration::read(&time.show()), Some(time));
            prop_assert_eq!(u64::read(&number.show()), Some(number));
            let share = Some(share).filter(|share| share.is_finite());
            prop_assert_eq!(share.and_then(|share| f64::read(&SettingValue::Text(share.show().to_string()))), share);
            let as_number = Duration::read(&SettingValue::Float(time.as_secs_f64()));
            prop_assert!(as_number.is_none_or(|read| read.abs_diff(time) <= time / 1_000_000));
        }
    }
}
