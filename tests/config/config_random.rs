//! Whatever a configuration says, it builds a working stack or says why not.

use std::convert::Infallible;

use buttress::{
    BoxError,
    config::{ClientConfig, ConfigErrors, ServerConfig},
    stack::ClientStack,
};
use http::{Request, Response};
use http_body_util::Empty;
use proptest::prelude::*;
use tower::{Layer, ServiceExt, service_fn};

type Nothing = Empty<bytes::Bytes>;

const KEYS: &[&str] = &[
    "preset",
    "streaming",
    "deadline_default",
    "deadline_at_most",
    "deadline_keep_back",
    "deadline_header",
    "retry_attempts",
    "retry_backoff",
    "retry_backoff_max",
    "retry_longest_wait",
    "retry_attempt_timeout",
    "retry_budget_ratio",
    "retry_budget_per_second",
    "retry_budget_cap",
    "retry_replay_up_to",
    "breaker_failures",
    "breaker_failure_ratio",
    "breaker_window",
    "breaker_min_calls",
    "breaker_open_for",
    "breaker_open_for_max",
    "breaker_half_open",
    "breaker_probe_lease",
    "breaker_ramp",
    "limit_max",
    "limit_queue",
    "limit_queue_wait",
    "timeout_head",
    "timeout_idle",
    "timeout_total",
    "max_connections",
    "connection_queue",
    "connect_timeout",
    "connection_max_age",
    "connection_max_idle",
    "peer_keep_alive",
    "health_uri",
    "nonsense",
];

const VALUES: &[&str] = &[
    "0",
    "1",
    "2",
    "5",
    "100",
    "-1",
    "4294967295",
    "4294967296",
    "18446744073709551615",
    "1e308",
    "-0.0",
    "0.5",
    "1.5",
    "NaN",
    "inf",
    "",
    " ",
    "off",
    "none",
    "true",
    "false",
    "1ns",
    "250ms",
    "3s",
    "10m",
    "584y",
    "18446744073709551615s",
    "internal",
    "slow",
    "llm",
    "x-left",
    "ü",
    "\u{0}",
];

async fn one_call(config: &ClientConfig) -> Result<(), ConfigErrors> {
    #[cfg(feature = "connect")]
    if config.check().is_ok() {
        let _ = config.connections.layer().expect("what was checked can be built");
    }
    let stack = ClientStack::new(config)?.layer(service_fn(|_: Request<_>| async {
        Ok::<_, Infallible>(Response::new(Nothing::new()))
    }));
    let answer: Result<_, BoxError> = stack.oneshot(Request::new(Nothing::new())).await;
    let late = config.deadline.default.is_some_and(|time| Some(time) <= config.deadline.keep_back);
    assert!(answer.is_ok() || late, "{:?} {}", answer.map(drop), config.explain());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_random_configuration_works_or_says_why_not(
        said in prop::collection::vec((prop::sample::select(KEYS), prop::sample::select(VALUES)), 0..5),
        free in prop::option::of((".{0,40}", ".{0,40}")),
    ) {
        let variables = said.iter().map(|(key, value)| (key.to_uppercase(), (*value).to_owned()));
        let variables: Vec<_> = variables.chain(free).collect();
        let named = |prefix: &str| variables.iter().map(|(key, value)| (format!("{prefix}{key}"), value.clone())).collect::<Vec<_>>();
        match ClientConfig::load("a").env_from(named("HTTP_CLIENT_")).finish() {
            Ok(config) => {
                let explained = config.explain();
                prop_assert!(explained.lines().count() > 20);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
                if let Err(errors) = runtime.block_on(one_call(&config)) {
                    prop_assert!(errors.iter().all(|error| error.to_string().len() > 20), "{}", errors);
                }
            }
            Err(errors) => prop_assert!(errors.iter().count() > 0),
        }
        if let Ok(config) = ServerConfig::load("a").env_from(named("HTTP_SERVER_")).finish() {
            prop_assert!(config.explain().lines().count() > 10);
            prop_assert_eq!(config.check().is_ok(), buttress::server(&config).is_ok());
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        let _ = ClientConfig::from_toml(&text);
        let _ = ClientConfig::from_json(&text);
    }
}
