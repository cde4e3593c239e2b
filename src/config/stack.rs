use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::{
    alias::{self, SettingAlias},
    group::{SettingRow, SettingsGroup},
    layers::{
        BreakerConfig, CallsConfig, CheckHealthConfig, ConnectConfig, DeadlineConfig,
        HealthProbeConfig, HedgeConfig, LimitConfig, RetryConfig, TimeoutConfig,
    },
    load::{ConfigErrors, Loader, Source, Sources, StackConfig},
    presets::ConfigPreset,
    value::{SettingValue, Tree},
};
use crate::sealed::Sealed;

/// A setting whose values differ between two configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SettingChange {
    /// The key of the setting.
    pub key: &'static str,
    /// Whether it can change while the stack runs.
    pub live: bool,
}

/// Defines the settings of a whole stack by those of its layers, outermost first.
macro_rules! stack {
    (
        $(#[$doc:meta])*
        $Name:ident, $kind:literal, prefix $prefix:literal, presets $presets:ident,
            off_for_streams $off:expr, aliases $aliases:expr;
        $($(#[$what:meta])+ $field:ident: $Type:ty = $default:expr;)*
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        #[non_exhaustive]
        pub struct $Name {
            /// The name of the service in errors, events and the names of environment variables.
            pub name: String,
            $($(#[$what])+ pub $field: $Type,)*
            preset: Option<ConfigPreset>,
            sources: Sources,
        }

        impl Default for $Name {
            fn default() -> Self {
                Self {
                    name: String::new(),
                    $($field: $default,)*
                    preset: None,
                    sources: Sources::new(),
                }
            }
        }

        impl Sealed for $Name {}

        impl StackConfig for $Name {
            const KIND: &'static str = $kind;
            const ENV_PREFIX: &'static str = $prefix;
            const OFF_FOR_STREAMS: &'static [&'static str] = $off;
            const ALIASES: &'static [SettingAlias] = $aliases;

            fn groups(&self) -> Vec<&dyn SettingsGroup> {
                vec![$(&self.$field),*]
            }

            fn groups_mut(&mut self) -> Vec<&mut dyn SettingsGroup> {
                vec![$(&mut self.$field),*]
            }

            fn set_loaded(&mut self, name: String, preset: Option<ConfigPreset>, sources: Sources) {
                (self.name, self.preset, self.sources) = (name, preset, sources);
            }

            fn presets(preset: ConfigPreset) -> &'static [(&'static str, &'static str)] {
                preset.$presets()
            }
        }

        impl $Name {
            /// Returns a loader of the settings of the service of this name.
            pub fn load(name: &str) -> Loader<Self> {
                Loader::new(name)
            }

            /// Loads the settings from a TOML text.
            ///
            /// # Errors
            ///
            /// See [`Loader::finish`].
            pub fn from_toml(text: &str) -> Result<Self, ConfigErrors> {
                Self::load("").toml(text).finish()
            }

            /// Loads the settings from a JSON text.
            ///
            /// # Errors
            ///
            /// See [`Loader::finish`].
            pub fn from_json(text: &str) -> Result<Self, ConfigErrors> {
                Self::load("").json(text).finish()
            }

            /// Loads the settings of the service of this name from the environment.
            ///
            /// # Errors
            ///
            /// See [`Loader::finish`].
            pub fn from_env(name: &str) -> Result<Self, ConfigErrors> {
                Self::load(name).env().finish()
            }

            /// Returns the configuration of a preset.
            #[must_use]
            pub fn preset(preset: ConfigPreset) -> Self {
                Self::load("").preset(preset).finish().unwrap_or_default()
            }

            /// Returns a text with every key, its value, the source of the value and its meaning. The layers are in
            /// their order, outermost first. The settings that cannot change while the stack is in use are marked. The
            /// text contains no [secrets](crate#secrets): userinfo and queries of URIs are `***`.
            #[must_use]
            pub fn explain(&self) -> String {
                Explained(self, &self.name, self.preset, &self.sources).to_string()
            }

            /// Returns the source of the value of this key. `None` if there is no such setting.
            #[must_use]
            pub fn source(&self, key: &str) -> Option<Source> {
                let (group, nth) = find(self, key)?;
                Some(source(&self.sources, &group.rows()[nth], &group.get(nth)))
            }

            /// Returns the settings whose values differ in `other`.
            #[must_use]
            pub fn changes(&self, other: &Self) -> Vec<SettingChange> {
                let mut changed = Vec::new();
                for (ours, theirs) in self.groups().into_iter().zip(other.groups()) {
                    let rows = ours.rows().iter().enumerate();
                    let differ = rows.filter(|(nth, _)| ours.get(*nth) != theirs.get(*nth));
                    changed.extend(differ.map(|(_, row)| SettingChange { key: row.key, live: row.live }));
                }
                changed
            }
        }

        impl $Name {
            /// Returns the settings of these groups that the application has set, with their values. Those of defaults
            /// and presets are left out.
            #[allow(dead_code, reason = "some stacks apply all of their settings")]
            pub(crate) fn chosen(&self, groups: &[&dyn SettingsGroup]) -> Vec<(&'static str, SettingValue)> {
                let defaults = Self::default();
                let mut chosen = Vec::new();
                for group in groups {
                    for (nth, row) in group.rows().iter().enumerate() {
                        let value = group.get(nth);
                        let is_default = || {
                            let (default, nth) = find(&defaults, row.key)?;
                            Some(default.get(nth) == value)
                        };
                        let is_chosen = match source(&self.sources, row, &value) {
                            Source::Preset(_) | Source::Implied(_) => false,
                            Source::Default => is_default() == Some(false),
                            _ => true,
                        };
                        chosen.extend(is_chosen.then_some((row.key, value)));
                    }
                }
                chosen
            }

            /// Copies the name and the settings of these keys from another configuration, with their sources.
            pub(crate) fn copy_from(&mut self, other: &Self, keys: &[&str]) {
                self.name.clone_from(&other.name);
                self.sources.retain(|key, _| !keys.contains(key));
                let kept = other.sources.iter().filter(|(key, _)| keys.contains(key));
                self.sources.extend(kept.map(|(key, source)| (*key, source.clone())));
                for (group, from) in self.groups_mut().into_iter().zip(other.groups()) {
                    let rows = group.rows().iter().enumerate();
                    for (nth, _) in rows.filter(|(_, row)| keys.contains(&row.key)) {
                        group.set(nth, &from.get(nth));
                    }
                }
            }
        }

        impl<'de> Deserialize<'de> for $Name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                Self::load("").tree(Tree::deserialize(from)?).finish().map_err(D::Error::custom)
            }
        }

        /// Serializes the values in a form that can be loaded again. A URI includes its userinfo and query.
        impl Serialize for $Name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                let groups = self.groups().into_iter();
                let rows = groups.flat_map(|group| {
                    group.rows().iter().enumerate().map(move |(nth, row)| (row.key, group.get(nth)))
                });
                to.collect_map(rows)
            }
        }
    };
}

stack! {
    /// The settings of a whole client stack. See the [module](super).
    ClientConfig, "client", prefix "HTTP_CLIENT_", presets client,
        off_for_streams &[], aliases alias::CLIENT;
    /// The deadline of a call.
    deadline: DeadlineConfig = DeadlineConfig::default();
    /// The retries.
    retry: RetryConfig = RetryConfig::default();
    /// The hedge attempts.
    hedge: HedgeConfig = HedgeConfig::off();
    /// The circuit breaker.
    breaker: BreakerConfig = BreakerConfig::default();
    /// The concurrency limit.
    limit: LimitConfig = LimitConfig::client();
    /// The timeouts of an attempt.
    timeout: TimeoutConfig = TimeoutConfig::default();
    /// The health probe of the upstream. Has an effect in the stack that [`client`](crate::stack::client) makes.
    health_probe: HealthProbeConfig = HealthProbeConfig::off();
    /// The connections. Has an effect in the stack that [`client`](crate::stack::client) makes.
    connect: ConnectConfig = ConnectConfig::default();
    /// The request of `check_health`. Has an effect in the stack that [`client`](crate::stack::client) makes.
    check_health: CheckHealthConfig = CheckHealthConfig::default();
    /// The properties of the calls.
    calls: CallsConfig = CallsConfig::default();
}

stack! {
    /// The settings of a whole server stack. See the [module](super).
    ServerConfig, "server", prefix "HTTP_SERVER_", presets server,
        off_for_streams &["timeout_min_body_rate", "limit_max_unread"], aliases &[];
    /// The deadline of a call.
    deadline: DeadlineConfig = DeadlineConfig::default();
    /// The concurrency limit.
    limit: LimitConfig = LimitConfig::server();
    /// The timeouts of a call.
    timeout: TimeoutConfig = TimeoutConfig::server();
    /// The properties of the calls.
    calls: CallsConfig = CallsConfig::default();
}

fn find<'a>(stack: &'a impl StackConfig, key: &str) -> Option<(&'a dyn SettingsGroup, usize)> {
    stack.groups().into_iter().find_map(|group| {
        let nth = group.rows().iter().position(|row| row.key == key)?;
        Some((group, nth))
    })
}

/// Returns the source of the value `now` of a setting. It is the loaded source, unless the application has changed the
/// value since.
fn source(sources: &Sources, row: &SettingRow, now: &SettingValue) -> Source {
    match sources.get(row.key) {
        Some((then, source)) if then == now => source.clone(),
        Some(_) => Source::Code,
        None => Source::Default,
    }
}

/// Returns notes on the combined effect of several settings of a layer.
fn note(group: &dyn SettingsGroup) -> Option<String> {
    let get = |key: &str| {
        let nth = group.rows().iter().position(|row| row.key == key)?;
        Some(group.get(nth).to_string()).filter(|value| value != "off")
    };
    if !group.rows().iter().any(|row| row.key == "deadline_max") {
        return None;
    }
    let max = ["deadline_max", "deadline_default"].into_iter().find_map(|key| {
        let time = get(key)?;
        Some(format!("a header of a caller sets at most {time} (`{key}`)"))
    });
    let unbounded = "a header of a caller has no maximum: set `deadline_default` or `deadline_max`";
    Some(max.unwrap_or_else(|| unbounded.to_owned()))
}

struct Explained<'a, C>(&'a C, &'a str, Option<ConfigPreset>, &'a Sources);

impl<C: StackConfig> fmt::Display for Explained<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(stack, name, preset, sources) = self;
        write!(f, "{}", C::KIND)?;
        if !name.is_empty() {
            write!(f, " `{name}`")?;
        }
        if let Some(preset) = preset {
            write!(f, ", preset {preset}")?;
        }
        writeln!(f, ", outermost first; settings marked * cannot change while the stack runs")?;
        let defaults = C::default();
        let max_width = sources.values().map(|(_, source)| source.to_string().len()).max();
        let width = max_width.unwrap_or_default().max(16);
        for (group, default) in stack.groups().into_iter().zip(defaults.groups()) {
            let off = if group.is_on() { "" } else { " (off)" };
            writeln!(f, "\n{}{off}", group.layer())?;
            for (nth, row) in group.rows().iter().enumerate() {
                let value = group.get(nth);
                let from = match source(sources, row, &value) {
                    Source::Default if value != default.get(nth) => Source::Code,
                    source => source,
                };
                let (value, from) = (value.redacted(), from.to_string());
                let mark = if row.live { ' ' } else { '*' };
                writeln!(f, "{mark} {:31} {value:12} {from:width$} {}", row.key, row.doc.trim())?;
            }
            if let Some(note) = note(group) {
                writeln!(f, "  note: {note}")?;
            }
        }
        Ok(())
    }
}
