//! Environment variables that other HTTP clients read, under the names that they have there.

/// A name that is not the key of a setting.
#[derive(Debug)]
pub struct Alias {
    pub(super) name: &'static str,
    pub(super) to: Target,
}

/// What replaces an [`Alias`].
#[derive(Debug)]
pub(super) enum Target {
    /// Each of these settings gets the value.
    Keys(&'static [&'static str]),
    /// The setting of this key counts attempts, and the value counts retries: it gets one more.
    Attempts(&'static str),
    /// No setting has this meaning. The remedy names the setting to use instead.
    Nothing(&'static str),
}

/// The names for a client.
pub(super) const CLIENT: &[Alias] = &[
    Alias { name: "max_connections", to: Target::Keys(&["connect_max_total"]) },
    Alias {
        name: "max_keepalive_connections",
        to: Target::Nothing(
            "use `connect_max_idle`, the time for which an idle connection is kept",
        ),
    },
    Alias { name: "default_timeout", to: Target::Keys(&["timeout_total"]) },
    // A read ends with the response head or with a frame of the body.
    Alias {
        name: "read_timeout",
        to: Target::Keys(&["timeout_head", "timeout_first_frame", "timeout_idle"]),
    },
    Alias { name: "write_timeout", to: Target::Keys(&["timeout_taking"]) },
    Alias { name: "max_retries", to: Target::Attempts("retry_attempts") },
    Alias { name: "retry_backoff_multiplier", to: Target::Keys(&["retry_backoff_factor"]) },
];

impl Target {
    /// Returns the remedy where the name is not accepted.
    pub(super) fn remedy(&self) -> String {
        match self {
            Self::Keys(keys) => format!("use `{}`", keys.join("`, `")),
            Self::Attempts(key) => format!("use `{key}`, which is one more than the retries"),
            Self::Nothing(remedy) => (*remedy).to_owned(),
        }
    }
}
