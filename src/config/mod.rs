//! A stack's settings on one page: from TOML, JSON or the environment, checked against each other, and explained.
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
//! What does not go together is said with its remedy:
//!
//! ```
//! # use buttress::config::ClientConfig;
//! let config = ClientConfig::from_toml("retry_attempts = 9").unwrap();
//! let errors = config.check().unwrap_err();
//! assert!(errors.to_string().contains("use at most 5 attempts, or a `breaker_failures` of at least 9"));
//! ```
//!
//! # How it decides
//!
//! Every setting has one key. In TOML and JSON it may be split at any `_` into tables; in the environment it is in
//! capitals, after `HTTP_CLIENT_` (a server's after `HTTP_SERVER_`), and after the service's own name where it is for
//! that one only:
//!
//! | | |
//! |---|---|
//! | TOML | `retry_attempts = 2`, or `attempts = 2` under `[retry]` |
//! | JSON | `{"retry": {"attempts": 2}}` |
//! | environment | `HTTP_CLIENT_RETRY_ATTEMPTS=2`, `SEARCH_HTTP_CLIENT_RETRY_ATTEMPTS=2` |
//!
//! Times are texts such as `250ms` or `1m 30s`, or seconds; `off` (`false`, `null`) is none. An unknown key is
//! an error, which names the key that it is a misspelling of, if any. A value of another form is an error that states the
//! form. So is one that is empty, as templates leave variables behind, one that is no UTF-8, and a key that one file says
//! twice.
//!
//! [`env_prefix`](Loader::env_prefix) replaces `HTTP_CLIENT_` and `HTTP_SERVER_`.
//!
//! Variables that Kubernetes and Docker inject for services with such names are ignored: those of a service called
//! `http-server` begin with `HTTP_SERVER_`, too (`HTTP_SERVER_SERVICE_HOST`, `HTTP_SERVER_PORT_80_TCP_ADDR`, …).
//!
//! Later goes before earlier: defaults, the preset, whatever was loaded in its order; a service's own variables go
//! before the common ones. [`explain`](ClientConfig::explain) prints every key with its value, where that came from,
//! and what it does: the table of all settings. For deadlines it states the maximum that a header of a caller can set:
//! `deadline_at_most`, or else `deadline_default`.
//!
//! # Names of other clients
//!
//! A client reads these variables, too, in both forms (`HTTP_CLIENT_MAX_RETRIES`, `SEARCH_HTTP_CLIENT_MAX_RETRIES`). A
//! variable with the name of a setting precedes them.
//!
//! | variable | setting |
//! |---|---|
//! | `MAX_CONNECTIONS` | `connect_max_total` |
//! | `CONNECT_TIMEOUT` | `connect_timeout` |
//! | `READ_TIMEOUT` | `timeout_head`, `timeout_first_frame` and `timeout_idle` |
//! | `WRITE_TIMEOUT` | `timeout_taking` |
//! | `DEFAULT_TIMEOUT` | `timeout_total`, for each attempt |
//! | `MAX_RETRIES` | `retry_attempts`, which is one more |
//! | `RETRY_BACKOFF_MULTIPLIER` | `retry_backoff_factor` |
//! | `MAX_KEEPALIVE_CONNECTIONS` | none: an error, which names `connect_max_idle` |
//!
//! # What is checked
//!
//! | [`check`](ClientConfig::check) finds | for |
//! |---|---|
//! | attempts that take longer than the deadline | `retry_attempts`, `timeout_head`, `deadline_default` |
//! | more attempts than failures open the circuit | `retry_attempts`, `breaker_failures`, `breaker_min_calls` |
//! | hedge attempts that are due after the attempt is over, or without a time | `hedge_after`, `hedge_max_hedges`, `timeout_head` |
//! | an attempt that is due before connecting is | `timeout_head`, `retry_attempt_timeout`, `timeout_total`, `timeout_response_total`, `connect_timeout` |
//! | a time for cancelled calls that ends after the attempt | `breaker_count_cancelled_after`, `timeout_head`, `retry_attempt_timeout`, `timeout_total`, `timeout_response_total` |
//! | a deadline of which nothing is left | `deadline_keep_back`, `deadline_default`, `deadline_at_most` |
//! | waiting longer than the deadline | `limit_queue_wait`, `connect_queue_wait`, `deadline_default` |
//! | connections idle for as long as the peer keeps them | `connect_max_idle`, `connect_peer_keep_alive` |
//! | a retry budget that can never pay | `retry_budget_ratio`, `retry_budget_per_second` |
//! | settings of a minimum body rate where there is none | `timeout_body_grace`, `timeout_min_body_rate_for_grpc` |
//! | a total on a stream | `streaming`, `timeout_total`, `timeout_response_total`, `deadline_default` |
//! | a time of the whole response that is not below that of the whole call | `timeout_response_total`, `timeout_total` |
//! | what a layer itself cannot work with | its own |
//!
//! # Presets
//!
//! | [`Preset`] | |
//! |---|---|
//! | `internal` | head 3 s, connecting 1 s, 10 s in all, short waits, a circuit that opens for 5 s |
//! | `slow` | head 60 s, connecting 10 s, long waits |
//! | `llm` | head and first frame 180 s, silences 60 s, no total, 8 connections a host, 32 calls at once |
//!
//! A server's have the same names: how long a head and a turn may take, and what is a stream. With `streaming = true`,
//! which `llm` sets, a server's `timeout_min_body_rate` and `limit_max_unread` are off unless they are set. A program
//! that sets the field `streaming` itself sets these two, too.
//!
//! # Changing it
//!
//! The fields are public: a program may set them, and `explain` says so. [`changes`](ClientConfig::changes) tells what
//! differs between two configurations, and which of that can change while the stack runs: all but
//! `deadline_header`, the retry budget, hedges, probes, a circuit's window and the kinds of its rules, `connect_tcp_keepalive` and `connect_http2_…`,
//! which `explain` marks with a `*`.
//!
//! # Layers of one's own stack
//!
//! Each layer's settings (`RetryConfig`, …) can be read alone, without the prefix in their keys, and make their layer:
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
mod presets;
mod stack;
mod value;

pub use self::{
    layers::{
        BreakerConfig, CallsConfig, CheckHealthConfig, ConnectConfig, DeadlineConfig,
        HealthProbeConfig, HedgeConfig, LimitConfig, RetryConfig, TimeoutConfig,
    },
    load::{ConfigErrors, Loader, Origin},
    presets::Preset,
    stack::{Change, ClientConfig, ServerConfig},
};
