//! The table of the settings of a layer. Each row has a name, a type, a default and a description. The struct, its
//! serialization, its `Debug` output and the rows of `explain` are generated from the table.

use serde::{Deserialize, Deserializer, de::Error};

use super::{
    alias::renamed,
    misspelt::near_miss,
    value::{SettingValue, Tree},
};
use crate::{error::ConfigError, redact};

/// The description of a setting, without its value.
#[derive(Debug)]
pub struct SettingRow {
    /// The name of the setting in files, in the environment (in capitals) and in errors.
    pub key: &'static str,
    /// The meaning of the setting, as `explain` prints it.
    pub doc: &'static str,
    /// The form of the value, as errors state it.
    pub(super) form: &'static str,
    /// Whether it can change while the stack runs.
    pub live: bool,
}

/// The settings of one layer.
pub trait SettingsGroup {
    /// Returns the name of the layer in the output of `explain`.
    fn layer(&self) -> &'static str;
    /// Returns the common prefix of the keys of this layer.
    fn prefix(&self) -> &'static str;
    /// Returns the descriptions of the settings.
    fn rows(&self) -> &'static [SettingRow];
    /// Sets the setting of a row. Returns `false` if the value does not have the form of that setting.
    fn set(&mut self, row: usize, value: &SettingValue) -> bool;
    /// Returns the value of the setting of a row.
    fn get(&self, row: usize) -> SettingValue;
    /// Returns whether the layer is on.
    fn is_on(&self) -> bool;
}

/// Reads the settings of a single layer. Their keys need no prefix.
pub(super) fn fill<'de, D: Deserializer<'de>>(
    group: &mut dyn SettingsGroup,
    prefix: &str,
    from: D,
) -> Result<(), D::Error> {
    for (key, value) in Tree::deserialize(from)?.flat() {
        let rows = group.rows();
        let named =
            |row: &SettingRow| row.key == key || row.key.strip_prefix(prefix) == Some(&*key);
        let Some(nth) = rows.iter().position(named) else {
            let full = format!("{prefix}{key}");
            let known = renamed(&full).or_else(|| near_miss(&full, rows.iter().map(|row| row.key)));
            let remedy = match known.map(|near| near.strip_prefix(prefix).unwrap_or(near)) {
                Some(nearest) => format!("use `{nearest}`"),
                None => "leave it out".to_owned(),
            };
            let key = redact::value(&key);
            let error =
                ConfigError::new(ConfigError::UNKNOWN_SETTING, format_args!("{key}"), remedy);
            return Err(D::Error::custom(error));
        };
        if !group.set(nth, &value) {
            let remedy = format!("use {}", rows[nth].form);
            let error = ConfigError::new(rows[nth].key, value, remedy);
            return Err(D::Error::custom(error));
        }
    }
    Ok(())
}

/// Returns the key of every setting, without the prefix, and its value.
pub(super) fn settings(
    group: &dyn SettingsGroup,
    prefix: &str,
) -> Vec<(&'static str, SettingValue)> {
    let rows = group.rows().iter().enumerate();
    rows.map(|(nth, row)| (row.key.strip_prefix(prefix).unwrap_or(row.key), group.get(nth)))
        .collect()
}

/// Defines the settings of a layer by a table. Settings that are `live` can change while the stack is in use. Settings
/// that are `fixed` cannot.
macro_rules! group {
    (
        $(#[$doc:meta])*
        $Name:ident for $layer:literal, prefix $prefix:literal, on $on:expr;
        $($(#[doc = $what:literal])+ $mode:ident $field:ident: $Type:ty = $default:expr;)*
    ) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq)]
        #[non_exhaustive]
        pub struct $Name {
            $($(#[doc = $what])+ pub $field: $Type,)*
        }

        /// Prints the values as [`explain`](super::stack::ClientConfig::explain) does, without
        /// [secrets](crate#secrets).
        impl ::std::fmt::Debug for $Name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                let mut all = f.debug_struct(stringify!($Name));
                $(all.field(stringify!($field), &self.$field.show());)*
                all.finish()
            }
        }

        impl Default for $Name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl SettingsGroup for $Name {
            fn layer(&self) -> &'static str {
                $layer
            }

            fn prefix(&self) -> &'static str {
                $prefix
            }

            fn rows(&self) -> &'static [SettingRow] {
                const ROWS: &[SettingRow] = &[$(SettingRow {
                    key: concat!($prefix, stringify!($field)),
                    doc: concat!($($what),+),
                    form: <$Type as Setting>::FORM,
                    live: group!(@ $mode),
                },)*];
                ROWS
            }

            fn set(&mut self, row: usize, value: &SettingValue) -> bool {
                let mut nth = 0..;
                $(if nth.next() == Some(row) {
                    return <$Type as Setting>::read(value).map(|read| self.$field = read).is_some();
                })*
                false
            }

            fn get(&self, row: usize) -> SettingValue {
                let mut nth = 0..;
                $(if nth.next() == Some(row) {
                    return self.$field.show();
                })*
                SettingValue::Text(String::new())
            }

            fn is_on(&self) -> bool {
                let on: fn(&Self) -> bool = $on;
                on(self)
            }
        }

        impl<'de> ::serde::Deserialize<'de> for $Name {
            fn deserialize<D: ::serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let mut group = Self::default();
                $crate::config::group::fill(&mut group, $prefix, from)?;
                Ok(group)
            }
        }

        impl ::serde::Serialize for $Name {
            fn serialize<S: ::serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_map($crate::config::group::settings(self, $prefix))
            }
        }
    };
    (@ live) => { true };
    (@ fixed) => { false };
}
pub(super) use group;
