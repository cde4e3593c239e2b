use std::fmt;

/// Settings for a kind of service, which replace the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigPreset {
    /// A service of the same operator in the same network, which responds within a second.
    Internal,
    /// A service with slow responses, or behind a slow network.
    Slow,
    /// A provider of large language models, whose first frame takes long and is followed by a stream.
    Llm,
}

type Table = &'static [(&'static str, &'static str)];

impl ConfigPreset {
    pub(crate) const ALL: [Self; 3] = [Self::Internal, Self::Slow, Self::Llm];

    /// Returns the name of the preset: `internal`, `slow`, `llm`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Internal => "internal",
            Self::Slow => "slow",
            Self::Llm => "llm",
        }
    }

    pub(super) const fn client(self) -> Table {
        match self {
            Self::Internal => &[
                ("deadline_default", "10s"),
                ("retry_backoff", "25ms"),
                ("retry_backoff_max", "1s"),
                ("breaker_open_for", "5s"),
                ("breaker_probe_timeout", "5s"),
                ("limit_queue_wait", "1s"),
                ("timeout_head", "3s"),
                ("timeout_first_frame", "5s"),
                ("timeout_response_idle", "10s"),
                ("timeout_request_idle", "10s"),
                ("connect_queue_wait", "1s"),
                ("connect_timeout", "1s"),
            ],
            Self::Slow => &[
                ("retry_backoff", "250ms"),
                ("retry_backoff_max", "20s"),
                ("breaker_open_for", "60s"),
                ("breaker_probe_timeout", "60s"),
                ("breaker_count_cancelled_after", "10s"),
                ("limit_queue_wait", "15s"),
                ("timeout_head", "60s"),
                ("timeout_first_frame", "60s"),
                ("timeout_response_idle", "120s"),
                ("timeout_request_idle", "120s"),
                ("connect_queue_wait", "15s"),
                ("connect_timeout", "10s"),
            ],
            Self::Llm => &[
                ("streaming", "true"),
                ("deadline_default", "off"),
                ("retry_backoff", "500ms"),
                ("retry_backoff_max", "30s"),
                ("retry_max_wait", "60s"),
                ("retry_unprocessed", "429, 529"),
                ("breaker_probe_timeout", "180s"),
                ("breaker_count_cancelled_after", "60s"),
                ("limit_max", "32"),
                ("limit_queue_wait", "60s"),
                ("timeout_head", "180s"),
                ("timeout_first_frame", "180s"),
                ("timeout_response_idle", "60s"),
                ("timeout_total", "off"),
                ("connect_max_per_host", "8"),
                ("connect_queue_wait", "60s"),
                ("connect_timeout", "10s"),
            ],
        }
    }

    pub(super) const fn server(self) -> Table {
        match self {
            Self::Internal => &[
                ("deadline_default", "10s"),
                ("limit_queue_wait", "200ms"),
                ("timeout_head", "10s"),
            ],
            Self::Slow => &[("limit_queue_wait", "5s"), ("timeout_head", "60s")],
            Self::Llm => &[
                ("streaming", "true"),
                ("limit_queue_wait", "5s"),
                ("timeout_head", "180s"),
                ("timeout_total", "off"),
            ],
        }
    }
}

impl fmt::Display for ConfigPreset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
