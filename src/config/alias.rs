//! Names that are no keys of settings: those of other HTTP clients, and keys of earlier versions.

/// A name that is not the key of a setting.
#[derive(Debug)]
pub struct SettingAlias {
    pub(super) name: &'static str,
    pub(super) to: Target,
}

/// The replacement of a [`SettingAlias`].
#[derive(Debug)]
pub(super) enum Target {
    /// Each of these settings gets the value.
    Keys(&'static [&'static str]),
    /// The value is a number of retries. The setting of this key is a number of attempts, which is greater by one.
    Attempts(&'static str),
    /// No setting has this meaning. The remedy names the setting to use instead.
    Nothing(&'static str),
}

/// The aliases of a client's settings.
pub(super) const CLIENT: &[SettingAlias] = &[
    SettingAlias { name: "max_connections", to: Target::Keys(&["connect_max_total"]) },
    SettingAlias {
        name: "max_keepalive_connections",
        to: Target::Nothing("use `connect_max_idle`, the maximum idle time of a connection"),
    },
    SettingAlias { name: "default_timeout", to: Target::Keys(&["timeout_total"]) },
    // A read ends with the response head or with a frame of the body.
    SettingAlias {
        name: "read_timeout",
        to: Target::Keys(&["timeout_head", "timeout_first_frame", "timeout_response_idle"]),
    },
    SettingAlias { name: "write_timeout", to: Target::Keys(&["timeout_request_stall"]) },
    SettingAlias { name: "max_retries", to: Target::Attempts("retry_attempts") },
    SettingAlias { name: "retry_backoff_multiplier", to: Target::Keys(&["retry_backoff_factor"]) },
];

impl Target {
    /// Returns the remedy for a source that does not accept the name, such as a file.
    pub(super) fn remedy(&self) -> String {
        match self {
            Self::Keys(keys) => format!("use `{}`", keys.join("`, `")),
            Self::Attempts(key) => format!("use `{key}`, the number of retries plus one"),
            Self::Nothing(remedy) => (*remedy).to_owned(),
        }
    }
}

/// Keys of earlier versions, and the keys that replace them.
const RENAMED: &[(&str, &str)] = &[
    ("breaker_probe_lease", "breaker_probe_timeout"),
    ("deadline_at_most", "deadline_max"),
    ("deadline_keep_back", "deadline_reserve"),
    ("hedge_replay_up_to", "hedge_max_replay_bytes"),
    ("retry_drain_up_to", "retry_max_drain_bytes"),
    ("retry_longest_wait", "retry_max_wait"),
    ("retry_replay_up_to", "retry_max_replay_bytes"),
    ("timeout_idle", "timeout_response_idle"),
    ("timeout_sending", "timeout_request_idle"),
    ("timeout_taking", "timeout_request_stall"),
];

/// Returns the key that replaces this key of an earlier version.
pub(super) fn renamed(key: &str) -> Option<&'static str> {
    RENAMED.iter().find(|(old, _)| *old == key).map(|(_, new)| *new)
}

#[cfg(test)]
mod tests {
    use super::{RENAMED, renamed};
    use crate::config::{ClientConfig, ConfigErrors};

    fn error(loaded: Result<ClientConfig, ConfigErrors>) -> String {
        loaded.expect_err("not a key").to_string()
    }

    #[test]
    fn key_of_an_earlier_version_is_an_error_that_names_the_new_key() {
        for (old, new) in RENAMED {
            assert_eq!(ClientConfig::default().source(old), None, "{old}");
            assert!(ClientConfig::default().source(new).is_some(), "{new}");
            assert_eq!(renamed(new), None, "{new}");

            let remedy = format!("unknown setting `{old}`: use `{new}` (file TOML)");
            assert_eq!(error(ClientConfig::from_toml(&format!("{old} = 1"))), remedy);
            let (table, key) = old.split_once('_').expect("a prefix");
            assert_eq!(error(ClientConfig::from_toml(&format!("[{table}]\n{key} = 1"))), remedy);
            let json = error(ClientConfig::from_json(&format!("{{\"{old}\": 1}}")));
            assert_eq!(json, format!("unknown setting `{old}`: use `{new}` (file JSON)"));

            let name = format!("SEARCH_HTTP_CLIENT_{}", old.to_ascii_uppercase());
            let env = ClientConfig::load("search").env_from([(&name, "1")]).finish();
            assert_eq!(error(env), format!("unknown setting `{old}`: use `{new}` (env {name})"));
        }
    }
}
