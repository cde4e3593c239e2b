//! Loads the settings of a whole stack from TOML, JSON or the environment, checks them against each other and explains
//! them.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use buttress::config::ClientConfig;
//!
//! let config = ClientConfig::load("search")
//!     .toml(
//!         "
//!         preset = 'internal'
//!         connect_max_total = 50
//!         [retry]
//!         attempts = 2
//!         [timeout]
//!         head = '250ms'
//!         [connect]
//!         timeout = '100ms'
//!         ",
//!     )
//!     .env()
//!     .finish()?;
//! config.check()?;
//! println!("{}", config.explain());
//! # Ok(()) }
//! ```
//!
//! Each conflict between settings is an error that states the remedy:
//!
//! ```
//! # use buttress::config::ClientConfig;
//! let config = ClientConfig::from_toml("retry_attempts = 9").unwrap();
//! let errors = config.check().unwrap_err();
//! assert!(errors.to_string().contains("use at most 5 attempts, or a `breaker_failures` of at least 9"));
//! ```
//!
//! # Keys and values
//!
//! Every setting has one key. In TOML and JSON, tables can replace any `_` of the key. In the environment, the key is
//! in capitals after the prefix `HTTP_CLIENT_`, or `HTTP_SERVER_` for a server. A variable for one service begins with
//! the name of the service:
//!
//! | | |
//! |---|---|
//! | TOML | `retry_attempts = 2`, or `attempts = 2` under `[retry]` |
//! | JSON | `{"retry": {"attempts": 2}}` |
//! | environment | `HTTP_CLIENT_RETRY_ATTEMPTS=2`, `SEARCH_HTTP_CLIENT_RETRY_ATTEMPTS=2` |
//!
//! A time is a text such as `250ms` or `1m 30s`, or a number of seconds. A list of statuses is a list, or a text such
//! as `429, 529`. `off`, `false` and `null` switch a setting off.
//!
//! These are errors:
//!
//! - an unknown key; the error suggests a key if the unknown one is a misspelling of it
//! - a value of another form; the error states the form
//! - an empty value, such as templates leave in variables, and a value that is not UTF-8
//! - a key that one file contains twice
//!
//! [`env_prefix`](Loader::env_prefix) replaces the prefix of variables. Variables that Kubernetes and Docker inject for
//! services are ignored: those of a service called `http-server` begin with `HTTP_SERVER_`, too
//! (`HTTP_SERVER_SERVICE_HOST`, `HTTP_SERVER_PORT_80_TCP_ADDR`, …).
//!
//! A preset replaces defaults, and loaded settings replace those of the preset. Of two loaded values, the later one
//! applies. Among variables, those of one service precede those of every service.
//!
//! [`explain`](ClientConfig::explain) prints every key with its value, the source of the value, and its meaning. For
//! deadlines it states the maximum that a header of a caller can set: `deadline_max`, or else `deadline_default`.
//!
//! # Names of other clients
//!
//! A client also reads variables with the names that other HTTP clients use, for every service
//! (`HTTP_CLIENT_MAX_RETRIES`) and for one (`SEARCH_HTTP_CLIENT_MAX_RETRIES`). A variable with the key of the setting
//! precedes one of these, unless only the latter is for one service.
//!
//! | variable | setting |
//! |---|---|
//! | `MAX_CONNECTIONS` | `connect_max_total` |
//! | `CONNECT_TIMEOUT` | `connect_timeout`, which is its key |
//! | `READ_TIMEOUT` | `timeout_head`, `timeout_first_frame` and `timeout_response_idle` |
//! | `WRITE_TIMEOUT` | `timeout_request_stall` |
//! | `DEFAULT_TIMEOUT` | `timeout_total`, for each attempt |
//! | `MAX_RETRIES` | `retry_attempts`, which is greater by one |
//! | `RETRY_BACKOFF_MULTIPLIER` | `retry_backoff_factor` |
//! | `MAX_KEEPALIVE_CONNECTIONS` | none: an error that names `connect_max_idle` |
//!
//! # What is checked
//!
//! | [`check`](ClientConfig::check) rejects | settings |
//! |---|---|
//! | attempts whose times exceed the deadline in total | `retry_attempts`, `timeout_head`, `retry_attempt_timeout`, `timeout_total`, `timeout_response_total`, `deadline_default` |
//! | more attempts than failures that open the circuit | `retry_attempts`, `breaker_failures`, `breaker_min_calls` |
//! | hedge attempts that are due after the end of the attempt, and a number of them without a delay | `hedge_after`, `hedge_percentile`, `hedge_max_hedges`, `timeout_head`, `retry_attempt_timeout`, `timeout_total`, `timeout_response_total` |
//! | a timeout of an attempt that is below the connect timeout | `timeout_head`, `retry_attempt_timeout`, `timeout_total`, `timeout_response_total`, `connect_timeout` |
//! | a time for cancelled calls that ends after the attempt | `breaker_count_cancelled_after`, `timeout_head`, `retry_attempt_timeout`, `timeout_total`, `timeout_response_total` |
//! | a deadline that leaves no time for the call | `deadline_reserve`, `deadline_default`, `deadline_max` |
//! | a queue in which a call can wait longer than its deadline | `limit_queue_wait`, `connect_queue_wait`, `deadline_default` |
//! | a maximum idle time that is not below the keep-alive time of the peer | `connect_max_idle`, `connect_peer_keep_alive` |
//! | a retry budget that practically never permits a retry | `retry_budget_ratio`, `retry_budget_per_second` |
//! | settings of a minimum body rate without a minimum body rate | `timeout_body_grace`, `timeout_min_body_rate_for_grpc` |
//! | a timeout of the whole call for streams | `streaming`, `timeout_total`, `timeout_response_total`, `deadline_default` |
//! | a timeout of the whole response that is not below that of the whole call | `timeout_response_total`, `timeout_total` |
//! | URIs of health checks that are not absolute | `check_health_uri`, `health_probe_uri` |
//! | everything that the layers reject | those of the layers |
//!
//! # Presets
//!
//! | [`ConfigPreset`] | settings of a client |
//! |---|---|
//! | `internal` | head 3 s, connect 1 s, deadline 10 s, short backoff and queue waits, a circuit that is open for 5 s |
//! | `slow` | head 60 s, connect 10 s, long queue waits |
//! | `llm` | head and first frame 180 s, idle 60 s, neither a total nor a deadline, 8 connections per host, 32 calls in flight, 429 and 529 retried for any method |
//!
//! The presets of a server have the same names. They set the timeout of the head, the maximum time in the queue, the
//! deadline of `internal`, and whether responses are streams. With `streaming = true`, which `llm` sets,
//! `timeout_min_body_rate` and `limit_max_unread` of a server are off unless they are set. An application that sets the
//! field `streaming` itself has to set these two, too.
//!
//! # Changes
//!
//! The fields are public. If the application sets one, `explain` states this as the source. The method
//! [`changes`](ClientConfig::changes) returns the settings that differ between two configurations, and whether each can
//! change while the stack runs. These cannot, and `explain` marks them with a `*`: `deadline_header`, the retry budget,
//! the settings of hedging and of the health probe, `breaker_window`, `connect_tcp_keepalive` and `connect_http2_…`.
//! The kinds of the rules of a circuit cannot change either.
//!
//! # Single layers
//!
//! The settings of each layer (`RetryConfig`, …) can be read alone, without the prefix of their keys, and make the
//! layer:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use buttress::config::TimeoutConfig;
//!
//! let timeout: TimeoutConfig = toml::from_str("head = '2s'\ntotal = 'off'")?;
//! let layer = timeout.layer()?;
//! # let _ = layer; Ok(()) }
//! ```

mod alias;
mod check;
mod group;
mod layers;
mod load;
mod misspelt;
mod presets;
mod stack;
mod value;

pub use self::{
    alias::SettingAlias,
    group::{SettingRow, SettingsGroup},
    layers::{
        BreakerConfig, CallsConfig, CheckHealthConfig, ConnectConfig, DeadlineConfig,
        HealthProbeConfig, HedgeConfig, LimitConfig, RetryConfig, TimeoutConfig,
    },
    load::{ConfigErrors, Loader, Source, StackConfig},
    presets::ConfigPreset,
    stack::{ClientConfig, ServerConfig, SettingChange},
    value::SettingValue,
};
