//! Loads settings from presets, files and the environment, and reports unknown ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsString,
    fmt, fs,
    marker::PhantomData,
    path::Path,
};

use super::{
    alias::{SettingAlias, Target, renamed},
    group::SettingsGroup,
    misspelt::near_miss,
    presets::ConfigPreset,
    value::{SettingValue, Tree},
};
use crate::{error::ConfigError, redact, sealed::Sealed};

/// The source of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The default of the setting.
    Default,
    /// The preset of this name.
    Preset(&'static str),
    /// The file of this name, or a text; then the name is `TOML` or `JSON`.
    File(String),
    /// The environment variable of this name.
    Env(String),
    /// The code of the application.
    Code,
    /// The default while the setting of this key is on.
    Implied(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Preset(name) => write!(f, "preset {name}"),
            Self::File(name) => write!(f, "file {name}"),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Code => f.write_str("code"),
            Self::Implied(key) => write!(f, "default if {key}"),
        }
    }
}

/// All errors of a configuration.
///
/// `Debug` is equal to `Display`, because a `main` that returns this error prints its `Debug` output. The text lists
/// the first 64 errors, and states how many more there are; [`iter`](Self::iter) returns all.
#[derive(Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub(crate) Vec<ConfigError>);

impl ConfigErrors {
    pub(crate) fn none_of(errors: Vec<ConfigError>) -> Result<(), Self> {
        if errors.is_empty() { Ok(()) } else { Err(Self(errors)) }
    }

    /// Returns an iterator over the errors.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

/// The number of errors that the text of a [`ConfigErrors`] lists.
const MAX_SHOWN: usize = 64;

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, error) in self.0.iter().take(MAX_SHOWN).enumerate() {
            write!(f, "{}{error}", if nth == 0 { "" } else { "\n" })?;
        }
        match self.0.len().saturating_sub(MAX_SHOWN) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl fmt::Debug for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for ConfigErrors {}

/// The settings of a whole stack, which a [`Loader`] loads: [`ClientConfig`](super::stack::ClientConfig) or
/// [`ServerConfig`](super::stack::ServerConfig).
///
/// The trait is sealed: it cannot be implemented outside of this crate.
pub trait StackConfig: Sealed + Default {
    /// `client` or `server`.
    const KIND: &'static str;
    /// The default prefix of the environment variables for every service.
    const ENV_PREFIX: &'static str;
    /// The names of environment variables that are not keys.
    const ALIASES: &'static [SettingAlias];
    /// The settings that are off by default where `streaming` is on.
    const OFF_FOR_STREAMS: &'static [&'static str];

    /// Returns the settings of the layers, outermost first.
    fn groups(&self) -> Vec<&dyn SettingsGroup>;

    /// Returns the settings of the layers, outermost first.
    fn groups_mut(&mut self) -> Vec<&mut dyn SettingsGroup>;

    /// Records the name of the stack, and where the loaded values are from.
    fn set_loaded(
        &mut self,
        name: String,
        preset: Option<ConfigPreset>,
        sources: BTreeMap<&'static str, (SettingValue, Source)>,
    );

    /// Returns the keys and values of a preset.
    fn presets(preset: ConfigPreset) -> &'static [(&'static str, &'static str)];
}

/// The loaded values by key, with their sources. If the current value of a setting differs from the value here, the
/// application has changed it.
pub(super) type Sources = BTreeMap<&'static str, (SettingValue, Source)>;

/// The key of [`CallsConfig`](super::layers::CallsConfig)'s setting.
const STREAMING: &str = "streaming";

/// Returns the value of a key.
fn get(config: &impl StackConfig, key: &str) -> Option<SettingValue> {
    config.groups().into_iter().find_map(|group| {
        let nth = group.rows().iter().position(|row| row.key == key)?;
        Some(group.get(nth))
    })
}

/// A value that was loaded, before it is applied to the configuration.
struct Loaded {
    key: String,
    value: SettingValue,
    source: Source,
}

/// Loads settings from several sources. A value that is loaded later replaces an earlier one.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use buttress::config::ClientConfig;
///
/// let config = ClientConfig::load("search")
///     .toml("preset = 'internal' \n [retry] \n attempts = 2")
///     .env()                          // HTTP_CLIENT_…, then SEARCH_HTTP_CLIENT_…
///     .finish()?;
/// assert_eq!(config.retry.attempts, 2);
/// # Ok(()) }
/// ```
///
/// The `Debug` output contains the names of settings and variables, and no values.
#[must_use = "a loader loads nothing until `finish`"]
pub struct Loader<C> {
    name: String,
    /// The prefix of environment variables for every service.
    env_prefix: String,
    has_read_env: bool,
    loaded: Vec<Loaded>,
    errors: Vec<ConfigError>,
    of: PhantomData<fn() -> C>,
}

/// Prints no values, because a variable with the prefix may be a password instead of a setting.
impl<C> fmt::Debug for Loader<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader")
            .field("name", &self.name)
            .field("settings", &self.loaded)
            .field("errors", &self.errors)
            .finish()
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown =
            redact::display(&format_args!("{} ({})", self.key, self.source), redact::MAX_VALUE);
        f.write_str(&shown)
    }
}

impl<C: StackConfig> Loader<C> {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            env_prefix: C::ENV_PREFIX.to_owned(),
            has_read_env: false,
            loaded: Vec::new(),
            errors: Vec::new(),
            of: PhantomData,
        }
    }

    /// Loads a TOML text: `retry_attempts = 2`, or `attempts = 2` in a table `retry`.
    pub fn toml(self, text: &str) -> Self {
        self.parsed("TOML", from_toml(text))
    }

    /// Loads a JSON text of the same form.
    pub fn json(self, text: &str) -> Self {
        self.parsed("JSON", serde_json::from_str(text).map_err(|error| error.to_string()))
    }

    /// Loads a file: JSON if its name ends with `.json`, otherwise TOML.
    pub fn file(mut self, path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let name = path.display().to_string();
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                self.push_error("file", &name, format!("cannot be read: {error}"));
                return self;
            }
        };
        let tree = if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json")) {
            serde_json::from_str(&text).map_err(|error| error.to_string())
        } else {
            from_toml(&text)
        };
        self.parsed(&name, tree)
    }

    pub(super) fn tree(self, tree: Tree) -> Self {
        self.parsed("settings", Ok(tree))
    }

    fn parsed(mut self, name: &str, tree: Result<Tree, String>) -> Self {
        match tree {
            Ok(tree) => {
                let (source, mut keys) = (Source::File(name.to_owned()), BTreeSet::new());
                for (key, value) in tree.flat() {
                    if !keys.insert(key.clone()) {
                        // Neither form of a key (in a table or not) precedes the other, so two forms are an error.
                        self.push_error(
                            "key",
                            &key,
                            format!("set twice; set it only once ({source})"),
                        );
                    }
                    self.loaded.push(Loaded { key, value, source: source.clone() });
                }
            }
            Err(error) => self.push_error("file", name, error),
        }
        self
    }

    /// Sets the prefix of environment variables. `HTTP_CLIENT_` or `HTTP_SERVER_` by default.
    ///
    /// With the prefix `ACME_`, `ACME_RETRY_ATTEMPTS` applies to every service and `SEARCH_ACME_RETRY_ATTEMPTS` to the
    /// service `search`. Each variable with the prefix has to be a setting, so a client and a server need different
    /// prefixes.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use buttress::config::ClientConfig;
    ///
    /// let variables = [("ACME_RETRY_ATTEMPTS", "2")];
    /// let config = ClientConfig::load("search").env_prefix("ACME_").env_from(variables).finish()?;
    /// assert_eq!(config.retry.attempts, 2);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`finish`](Self::finish) fails if the prefix contains other characters than ASCII letters, digits and `_`, if it
    /// does not end with `_`, or if it is set after [`env`](Self::env) has read the variables.
    pub fn env_prefix(mut self, prefix: &str) -> Self {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let remedy = if self.has_read_env {
            Some("set it before `env` reads the variables")
        } else if prefix.trim_matches('_').is_empty()
            || !prefix.chars().all(is_name)
            || !prefix.ends_with('_')
        {
            Some("use letters, digits and `_`, with `_` at the end, such as ACME_")
        } else {
            None
        };
        match remedy {
            None => prefix.clone_into(&mut self.env_prefix),
            Some(remedy) => {
                let prefix = if prefix.is_empty() { "empty" } else { prefix };
                self.push_error("env_prefix", prefix, remedy.to_owned());
            }
        }
        self
    }

    /// Loads the environment: `HTTP_CLIENT_RETRY_ATTEMPTS` for every service, then
    /// `SEARCH_HTTP_CLIENT_RETRY_ATTEMPTS` for the service `search`. The variables of a server begin with
    /// `HTTP_SERVER_`. [`env_prefix`](Self::env_prefix) sets another prefix.
    ///
    /// A client also reads variables with the [names of other clients](super#names-of-other-clients).
    ///
    /// Kubernetes and Docker inject variables for each service that a container can reach. Those of a service called
    /// `http-server`, `http-server-…` or `search-http-client` have the same prefix. They are ignored.
    pub fn env(self) -> Self {
        self.env_from(env::vars_os())
    }

    /// Loads these variables as [`env`](Self::env) does those of the process.
    pub fn env_from<K, V>(mut self, variables: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let own = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let own: String = self.name.chars().map(own).collect();
        let own = format!("{own}_{}", self.env_prefix);
        self.has_read_env = true;
        let defaults = C::default();
        let is_known = |key: &str| {
            let mut rows = defaults.groups().into_iter().flat_map(SettingsGroup::rows);
            key == "preset" || rows.any(|row| row.key == key)
        };
        let mut found = Vec::new();
        for (name, value) in variables {
            // A name with the prefix that is not UTF-8 is an unknown setting.
            let name = name.into().to_string_lossy().into_owned();
            let (of_own, key) = match (name.strip_prefix(&own), name.strip_prefix(&self.env_prefix))
            {
                (Some(key), _) if !self.name.is_empty() => (true, key),
                (_, Some(key)) => (false, key),
                _ => continue,
            };
            let key = key.to_ascii_lowercase();
            let value = value.into();
            if !is_known(&key) && is_service_link(&key, &value.to_string_lossy()) {
                continue;
            }
            match value.into_string() {
                Ok(value) => found.push((of_own, alias::<C>(&key).is_none(), name, key, value)),
                Err(_) => self.push_error("environment", &name, "use UTF-8".to_owned()),
            }
        }
        // Variables for every service precede those for one, and aliases precede keys, because a later value replaces
        // an earlier one. The order of the environment has no meaning.
        found.sort();
        for (_, _, name, key, value) in found {
            let (keys, value) = match alias::<C>(&key).map(|alias| &alias.to) {
                Some(Target::Keys(keys)) => (*keys, SettingValue::Text(value)),
                Some(Target::Attempts(key)) => {
                    let attempts =
                        value.trim().parse::<u32>().map(|retries| i64::from(retries) + 1);
                    (
                        std::slice::from_ref(key),
                        attempts.map_or(SettingValue::Text(value), SettingValue::Int),
                    )
                }
                Some(Target::Nothing(_)) | None => {
                    let source = Source::Env(name);
                    self.loaded.push(Loaded { key, value: SettingValue::Text(value), source });
                    continue;
                }
            };
            self.loaded.extend(keys.iter().map(|key| Loaded {
                key: (*key).to_owned(),
                value: value.clone(),
                source: Source::Env(name.clone()),
            }));
        }
        self
    }

    /// Replaces defaults by those of a preset, unless a source names another preset.
    pub fn preset(mut self, preset: ConfigPreset) -> Self {
        let value = SettingValue::Text(preset.as_str().to_owned());
        self.loaded.insert(0, Loaded { key: "preset".to_owned(), value, source: Source::Code });
        self
    }

    /// Returns the configuration.
    ///
    /// # Errors
    ///
    /// Returns an error for each file and value that cannot be read, and for each unknown setting. The error of an
    /// unknown setting suggests a key if the setting is a misspelling of it. Conflicts between settings are errors of
    /// `check`.
    pub fn finish(mut self) -> Result<C, ConfigErrors> {
        let mut config = C::default();
        let mut sources = Sources::new();
        let mut preset = None;
        let (presets, loaded): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.loaded).into_iter().partition(|loaded| loaded.key == "preset");
        for loaded in presets {
            match ConfigPreset::ALL.iter().find(|known| loaded.value.is_written(known.as_str())) {
                Some(known) => preset = Some(*known),
                None => {
                    let known = ConfigPreset::ALL.map(|preset| preset.as_str()).join(", ");
                    self.not_of_form("preset", &loaded, &format!("one of {known}"));
                }
            }
        }
        if let Some(preset) = preset {
            for (key, text) in C::presets(preset) {
                let source = Source::Preset(preset.as_str());
                let (key, value) = ((*key).to_owned(), SettingValue::Text((*text).to_owned()));
                self.set(&mut config, &mut sources, Loaded { key, value, source });
            }
        }
        for loaded in loaded {
            self.set(&mut config, &mut sources, loaded);
        }
        let is_streaming = get(&config, STREAMING) == Some(SettingValue::Bool(true));
        let implied = C::OFF_FOR_STREAMS.iter().filter(|key| !sources.contains_key(**key));
        for key in implied.filter(|_| is_streaming).collect::<Vec<_>>() {
            let (key, value) = ((*key).to_owned(), SettingValue::Bool(false));
            let source = Source::Implied(STREAMING);
            self.set(&mut config, &mut sources, Loaded { key, value, source });
        }
        ConfigErrors::none_of(self.errors)?;
        config.set_loaded(self.name, preset, sources);
        Ok(config)
    }

    fn set(&mut self, config: &mut C, sources: &mut Sources, loaded: Loaded) {
        for group in config.groups_mut() {
            let rows = group.rows();
            let Some(nth) = rows.iter().position(|row| row.key == loaded.key) else { continue };
            if group.set(nth, &loaded.value) {
                sources.insert(rows[nth].key, (group.get(nth), loaded.source));
            } else {
                self.not_of_form(rows[nth].key, &loaded, rows[nth].form);
            }
            return;
        }
        let rows = config.groups().into_iter().flat_map(SettingsGroup::rows);
        let near = || {
            let keys: Vec<_> = rows.map(|row| row.key).chain(["preset"]).collect();
            let key = renamed(&loaded.key).filter(|key| keys.contains(key));
            let key = key.or_else(|| near_miss(&loaded.key, keys.iter().copied()));
            key.map(|key| format!("use `{key}`"))
        };
        let remedy = alias::<C>(&loaded.key).map(|alias| alias.to.remedy()).or_else(near);
        let remedy = remedy.as_deref().unwrap_or("leave it out");
        let remedy = format!("{remedy} ({})", loaded.source);
        self.push_error(ConfigError::UNKNOWN_SETTING, &loaded.key, remedy);
    }

    fn not_of_form(&mut self, key: &'static str, loaded: &Loaded, form: &str) {
        let source = &loaded.source;
        if loaded.value.is_written("") {
            self.push_error(key, "empty", format!("use {form}, or leave it out ({source})"));
        } else {
            self.errors.push(ConfigError::new(
                key,
                &loaded.value,
                format!("use {form} ({source})"),
            ));
        }
    }

    fn push_error(&mut self, field: &'static str, value: &str, remedy: String) {
        self.errors.push(ConfigError::new(field, format_args!("{}", redact::value(value)), remedy));
    }
}

fn from_toml(text: &str) -> Result<Tree, String> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.map(|before| format!(" at line {}", before.matches('\n').count() + 1));
        format!("{}{}", error.message(), line.unwrap_or_default())
    })
}

// ===== Variables of the platform =====

/// Returns whether Kubernetes or Docker injects this variable for a service. `key` is its name in lower case, without a
/// prefix that belongs to the name of the service.
///
/// Kubernetes injects `X_SERVICE_HOST`, `X_SERVICE_PORT`, `X_SERVICE_PORT_<NAME>`, `X_PORT`, and for each port
/// `X_PORT_<N>_<PROTOCOL>` with the suffixes `_ADDR`, `_PORT` and `_PROTO`. The latter are those of Docker's links,
/// which also have `X_NAME` and `X_ENV_…`. The name of the service may be longer than the prefix, so each form may
/// follow a further part of that name.
fn is_service_link(key: &str, value: &str) -> bool {
    let parts: Vec<&str> = key.split('_').collect();
    (0..parts.len()).any(|at| match &parts[at..] {
        ["service", "host"] | ["service", "port", ..] => true,
        ["port"] => value.contains("://"),
        ["port", number, "tcp" | "udp" | "sctp", rest @ ..] => {
            number.parse::<u16>().is_ok() && matches!(rest, [] | ["addr"] | ["port"] | ["proto"])
        }
        // A value such as `/web/http-server`.
        ["name"] => at == 0 && value.starts_with('/'),
        ["env", _, ..] => at == 0,
        _ => false,
    })
}

/// Returns the alias of this name.
fn alias<C: StackConfig>(name: &str) -> Option<&'static SettingAlias> {
    C::ALIASES.iter().find(|alias| alias.name == name)
}
