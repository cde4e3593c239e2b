//! Every configuration is either an error or builds a stack that works.

use std::{
    cell::RefCell, collections::BTreeSet, convert::Infallible, future::Future, time::Duration,
};

use buttress::{
    BoxError,
    config::{ClientConfig, ConfigErrors, ConfigPreset, ServerConfig},
    stack::ClientStack,
};
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Map, Value, json};
use tower::{Layer, ServiceExt, service_fn};

use crate::support::fuzz::cases;

type Nothing = Empty<bytes::Bytes>;

/// Invalid and extreme values.
const HOSTILE: &[&str] = &[
    "0",
    "-1",
    "4294967295",
    "4294967296",
    "18446744073709551615",
    "1e308",
    "-0.0",
    "NaN",
    "inf",
    "",
    " ",
    "none",
    "true",
    "false",
    "1ns",
    "584y",
    "18446744073709551615s",
    "999999999999999999999y",
    "\u{fc}",
    "\u{0}",
    "{}",
];

/// The number of cases that puts each key into a valid configuration.
const MANY: u32 = 1200;

/// Returns all keys of the configuration.
fn keys<C: serde::Serialize>(config: &C) -> Vec<String> {
    let all = serde_json::to_value(config).unwrap();
    all.as_object().unwrap().keys().cloned().chain(["preset".to_owned()]).collect()
}

fn plausible(key: &str) -> BoxedStrategy<Value> {
    let text = |text: &'static str| Just(json!(text));
    match key {
        "preset" => {
            prop::sample::select(vec!["internal", "slow", "llm"]).prop_map(Value::from).boxed()
        }
        "streaming"
        | "connect_http2_only"
        | "timeout_min_body_rate_for_grpc"
        | "retry_wait_on_rejection"
        | "health_probe_immediate_failure"
        | "limit_exempt_grpc_health" => any::<bool>().prop_map(Value::from).boxed(),
        "retry_unprocessed" => {
            prop::sample::select(vec![json!([429, 529]), json!("503"), json!([200]), json!("off")])
                .boxed()
        }
        "deadline_header" => text("x-left").boxed(),
        "check_health_uri" | "health_probe_uri" => text("http://search:8080/healthz").boxed(),
        "breaker_failure_ratio"
        | "retry_budget_ratio"
        | "connect_jitter"
        | "hedge_percentile"
        | "hedge_budget_ratio"
        | "health_probe_jitter" => {
            (1u32..1000).prop_map(|part| json!(f64::from(part) / 1000.0)).boxed()
        }
        _ => {
            let number = || prop::sample::select(vec![1u32, 2, 3, 5, 10, 20, 50, 100, 300]);
            let millis =
                prop::sample::select(vec![1u32, 20, 100, 500, 2000, 9000, 60_000, 300_000]);
            prop_oneof![
                4 => number().prop_map(Value::from),
                2 => millis.prop_map(|ms| json!(format!("{ms}ms"))),
                1 => number().prop_map(|n| json!(n.to_string())),
                1 => text("off"),
            ]
            .boxed()
        }
    }
}

fn hostile() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => prop::sample::select(HOSTILE).prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => any::<u64>().prop_map(Value::from),
        1 => prop::sample::select(vec![-0.5, 0.1, 1.5, 5e-324, 1e300]).prop_map(Value::from),
        1 => any::<bool>().prop_map(Value::from),
        1 => ".{0,20}".prop_map(Value::from),
        1 => Just(Value::Null),
    ]
}

/// A few settings, most of them with a plausible value.
fn said(keys: Vec<String>) -> impl Strategy<Value = Map<String, Value>> {
    let one = prop::sample::select(keys).prop_flat_map(|key| {
        let value = prop_oneof![6 => plausible(&key), 1 => hostile()];
        (Just(key), value)
    });
    prop::collection::vec(one, 0..6).prop_map(|said| {
        let mut said: Map<String, Value> = said.into_iter().collect();
        // These settings are errors without a rate.
        if ["timeout_body_grace", "timeout_min_body_rate_for_grpc"]
            .iter()
            .any(|key| said.contains_key(*key))
        {
            said.entry("timeout_min_body_rate").or_insert(json!(240));
        }
        // More than one hedge attempt is an error without a delay or a percentile.
        if said.contains_key("hedge_max_hedges") {
            said.entry("hedge_percentile").or_insert(json!(0.95));
        }
        said
    })
}

/// Returns the settings as variables of an environment.
fn variables(prefix: &str, said: &Map<String, Value>) -> Vec<(String, String)> {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(Value::to_string).collect::<Vec<_>>().join(","),
        Value::Null => "off".to_owned(),
        other => other.to_string(),
    };
    let name = |key: &str| format!("{prefix}{}", key.to_uppercase());
    said.iter().map(|(key, value)| (name(key), text(value))).collect()
}

fn paused<T>(future: impl Future<Output = T>) -> T {
    let builder = &mut tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap().block_on(future)
}

/// Checks that each error names a setting, its value and a remedy.
fn is_specific(errors: &ConfigErrors, keys: &[String]) -> Result<(), TestCaseError> {
    prop_assert!(errors.iter().count() > 0);
    for error in errors.iter() {
        let of = error.field;
        prop_assert!(
            matches!(of, "key" | "unknown setting") || keys.iter().any(|key| key == of),
            "{error}"
        );
        prop_assert!(!error.value.is_empty() && error.remedy.len() > 9, "{error}");
    }
    Ok(())
}

#[test]
fn fuzz_random_client_works_or_is_an_error() {
    let keys = keys(&ClientConfig::default());
    let built = RefCell::new(BTreeSet::new());
    let cases = cases(MANY);
    let enough = cases.cases >= MANY;
    let result = TestRunner::new(cases).run(&said(keys.clone()), |said| {
        let json = Value::Object(said.clone()).to_string();
        let of_json = ClientConfig::from_json(&json);
        let of_env = ClientConfig::load("a").env_from(variables("A_HTTP_CLIENT_", &said)).finish();
        for config in [of_json, of_env] {
            let built_one = match config {
                Ok(config) => client_works(&config, &keys)?,
                Err(errors) => is_specific(&errors, &keys).map(|()| false)?,
            };
            if built_one {
                built.borrow_mut().extend(said.keys().cloned());
            }
        }
        Ok(())
    });
    result.unwrap();
    let never: Vec<_> = keys.iter().filter(|key| !built.borrow().contains(*key)).collect();
    assert!(never.is_empty() || !enough, "in no valid configuration: {never:?}");
}

/// Checks that the stack of a valid configuration works. Returns `false` if the configuration is invalid.
fn client_works(config: &ClientConfig, keys: &[String]) -> Result<bool, TestCaseError> {
    let explained = config.explain();
    prop_assert!(keys.iter().filter(|key| *key != "preset").all(|key| explained.contains(key)));
    if let Err(errors) = config.check() {
        prop_assert!(ClientStack::new(config).is_err());
        return is_specific(&errors, keys).map(|()| false);
    }
    let written = serde_json::to_string(config).unwrap();
    let read = ClientConfig::from_json(&written).unwrap();
    prop_assert!(read.changes(config).is_empty(), "{:?} {}", read.changes(config), written);
    {
        let layer = config.connect.layer().expect("a checked configuration can be built");
        let _ =
            config.connect.client(layer).checked().expect("a checked configuration can be built");
    }
    paused(async {
        let stack = ClientStack::new(config).expect("a checked configuration can be built");
        let handle = stack.handle();
        let client = stack.layer(service_fn(|request: Request<_>| async move {
            match request.uri().path() {
                "/hangs" => std::future::pending().await,
                "/fails" => Ok(Response::builder()
                    .status(503)
                    .body(Full::<bytes::Bytes>::default())
                    .unwrap()),
                _ => Ok::<_, Infallible>(Response::new(Full::from("hello"))),
            }
        }));
        let ask = |path| client.clone().oneshot(Request::get(path).body(Nothing::new()).unwrap());
        let answer: Result<_, BoxError> = ask("/").await;
        let answer = answer.map_err(|error| TestCaseError::fail(format!("{error} {explained}")))?;
        prop_assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "hello");
        prop_assert!(ask("/fails").await.map_or(true, |answer| answer.status() == 503));
        let long = Duration::from_secs(100 * 365 * 24 * 3600);
        let hangs = tokio::time::timeout(long, ask("/hangs")).await;
        prop_assert!(
            hangs.is_err() || hangs.is_ok_and(|ended| ended.is_err()),
            "a hung upstream does not respond"
        );
        let seen = handle.snapshot();
        prop_assert_eq!((seen.total, seen.in_flight, seen.successes), (3, 0, 1));
        // Restores the default settings, except those that cannot change.
        let fixed = handle.update(&ClientConfig::default()).unwrap();
        for change in handle.config().changes(&ClientConfig::default()) {
            prop_assert!(
                fixed.contains(&change.key),
                "{} was neither changed nor returned",
                change.key
            );
        }
        Ok(true)
    })
}

#[test]
fn fuzz_random_server_works_or_is_an_error() {
    let keys = keys(&ServerConfig::default());
    let built = RefCell::new(BTreeSet::new());
    let cases = cases(MANY);
    let enough = cases.cases >= MANY;
    let result = TestRunner::new(cases).run(&said(keys.clone()), |said| {
        let of_env = ServerConfig::load("").env_from(variables("HTTP_SERVER_", &said)).finish();
        let of_json = ServerConfig::from_json(&Value::Object(said.clone()).to_string());
        for config in [of_json, of_env] {
            let config = match config {
                Ok(config) => config,
                Err(errors) => {
                    is_specific(&errors, &keys)?;
                    continue;
                }
            };
            prop_assert!(config.explain().lines().count() > 10);
            if let Err(errors) = config.check() {
                prop_assert!(buttress::server(&config).is_err());
                is_specific(&errors, &keys)?;
                continue;
            }
            let stack = buttress::server(&config).expect("a checked configuration can be built");
            let app = stack.layer(service_fn(|_: Request<Nothing>| async {
                Ok::<_, Infallible>(Response::new(Full::<bytes::Bytes>::from("hello")))
            }));
            let answer = paused(app.oneshot(Request::new(Nothing::new())));
            prop_assert_eq!(answer.unwrap().status(), 200, "{}", config.explain());
            built.borrow_mut().extend(said.keys().cloned());
        }
        Ok(())
    });
    result.unwrap();
    let never: Vec<_> = keys.iter().filter(|key| !built.borrow().contains(*key)).collect();
    assert!(never.is_empty() || !enough, "in no valid configuration: {never:?}");
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn fuzz_any_text_is_read_or_rejected(text in ".{0,200}", table in "([a-z_.]{1,9}( = |\\]|\\[|\n|[0-9'\"]{1,3}){1,4}){0,9}") {
        for text in [text, table] {
            let _ = ClientConfig::from_toml(&text);
            let _ = ClientConfig::from_json(&text);
        }
    }

    #[test]
    fn fuzz_any_variable_is_read_or_rejected(name in "(A_)?(HTTP_CLIENT_)?[A-Z_]{0,9}.{0,9}", value in ".{0,40}") {
        let ours = name.starts_with("HTTP_CLIENT_") || name.starts_with("A_HTTP_CLIENT_");
        let read = ClientConfig::load("a").env_from([(name, value)]).finish();
        prop_assert!(ours || read.is_ok(), "foreign variables are ignored");
    }
}

/// Values that only a program can set, because no file can contain them.
#[test]
fn numbers_that_only_code_can_set_are_checked_too() {
    for bad in [f64::NAN, f64::INFINITY, -1.0, 1e308] {
        let mut config = ClientConfig::preset(ConfigPreset::Internal);
        config.retry.budget_ratio = bad;
        config.breaker.failure_ratio = Some(bad);
        let told = config.check().unwrap_err();
        let fields: Vec<_> = told.iter().map(|error| error.field).collect();
        assert_eq!(fields, ["retry_budget_ratio", "breaker_failure_ratio"], "{told}");
    }
    let mut config = ClientConfig::default();
    let far = Duration::MAX;
    config.deadline.default = Some(far);
    config.timeout.head = Some(far);
    config.breaker.open_for = far;
    config.limit.queue_wait = far;
    assert!(client_works(&config, &keys(&config)).unwrap(), "the maximum duration is valid");
}
