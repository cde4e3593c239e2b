//! Each conflict between settings, with the text of its error.

use buttress::config::{ClientConfig, ServerConfig};

#[track_caller]
fn told(toml: &str) -> Vec<String> {
    match ClientConfig::from_toml(toml).unwrap().check() {
        Ok(()) => Vec::new(),
        Err(errors) => errors.iter().map(ToString::to_string).collect(),
    }
}

#[track_caller]
fn one(conflicting: &str, fine: &str, sentence: &str) {
    assert_eq!(told(conflicting), [sentence]);
    assert_eq!(told(fine), Vec::<String>::new());
}

#[test]
fn attempts_that_exceed_the_deadline_in_total_are_an_error() {
    one(
        "deadline_default = '10s'\ntimeout_head = '5s'",
        "deadline_default = '15s'\ntimeout_head = '5s'",
        "`retry_attempts` is 3: 3 attempts of up to 5s each (`timeout_head`) take 15s, over the deadline of 10s \
         (`deadline_default`): use at most 2, or a `timeout_head` of at most 3s 333ms, or a deadline of at \
         least 15s",
    );
    one(
        "deadline_default = '10s'\nretry_attempt_timeout = '9s'\nretry_attempts = 2",
        "deadline_default = '10s'\nretry_attempt_timeout = '9s'\nretry_attempts = 1",
        "`retry_attempts` is 2: 2 attempts of up to 9s each (`retry_attempt_timeout`) take 18s, over the deadline of 10s \
         (`deadline_default`): use at most 1, or a `retry_attempt_timeout` of at most 5s, or a deadline of at least 18s",
    );
}

#[test]
fn more_attempts_than_the_threshold_of_the_breaker_are_an_error() {
    one(
        "retry_attempts = 6",
        "retry_attempts = 5",
        "`retry_attempts` is 6: one call alone would open the circuit, which takes 5 failures in a row \
         (`breaker_failures`), and its attempts after that would be rejected: use at most 5 attempts, or a \
         `breaker_failures` of at least 6",
    );
    one(
        "breaker_failures = 'off'\nbreaker_failure_ratio = 0.5\nbreaker_min_calls = 2",
        "breaker_failures = 'off'\nbreaker_failure_ratio = 0.5\nbreaker_min_calls = 3",
        "`retry_attempts` is 3: one call alone would open the circuit, which takes 2 calls, if all of them fail \
         (`breaker_min_calls`), and its attempts after that would be rejected: use at most 2 attempts, or a \
         `breaker_min_calls` of at least 3",
    );
    assert!(told("retry_attempts = 6\nbreaker_failures = 'off'").is_empty());
}

#[test]
fn timeout_of_an_attempt_below_the_connect_timeout_is_an_error() {
    one(
        "timeout_head = '2s'",
        "timeout_head = '2s'\nconnect_timeout = '1s'",
        "`timeout_head` is 2s: an attempt includes the connect, whose timeout of 5s (`connect_timeout`) would never \
         expire: use more than that, or a `connect_timeout` of less than 2s",
    );
    for key in ["retry_attempt_timeout", "timeout_total", "timeout_response_total"] {
        let told = told(&format!("{key} = '2s'"));
        assert!(
            told.len() == 1 && told[0].starts_with(&format!("`{key}` is 2s: an attempt includes")),
            "{told:?}"
        );
    }
}

#[test]
fn hedge_attempt_that_is_due_when_the_attempt_is_over_is_an_error() {
    one(
        "hedge_after = '30s'",
        "hedge_after = '29s'",
        "`hedge_after` is 30s: an attempt is over after 30s (`timeout_head`), before the hedge attempt is sent: use less, or \
         a `timeout_head` of more than 30s",
    );
    one(
        "hedge_after = '10s'\nhedge_max_hedges = 3",
        "hedge_after = '10s'\nhedge_max_hedges = 2",
        "`hedge_max_hedges` is 3: an attempt is over after 30s (`timeout_head`), before the last hedge attempt, each sent 10s \
         (`hedge_after`) after the previous one: use at most 2, or a `timeout_head` of more than 30s",
    );
    one(
        "hedge_max_hedges = 2",
        "hedge_max_hedges = 2\nhedge_percentile = 0.95",
        "`hedge_max_hedges` is 2: without `hedge_after` or `hedge_percentile` this has no effect: set one of them, or leave \
         this out",
    );
    assert_eq!(
        told("hedge_after = '1s'\nhedge_max_hedges = 11"),
        ["`hedge_max_hedges` is 11: use 1 to 10 hedge attempts"]
    );
    assert!(told("hedge_after = '0s'")[0].starts_with("`hedge_after` is 0ns: use more than zero"));
    let budget = told("hedge_budget_ratio = 95");
    assert!(
        budget[0].starts_with("`hedge_budget_ratio` is 95.0: use a share"),
        "also if it is off"
    );
    assert!(
        told("hedge_percentile = 95")[0].starts_with("`hedge_percentile` is 95.0: use a share")
    );
}

#[test]
fn reserve_that_leaves_no_time_before_the_deadline_is_an_error() {
    one(
        "deadline_default = '90s'\ndeadline_reserve = '90s'",
        "deadline_default = '90s'\ndeadline_reserve = '89s'",
        "`deadline_reserve` is 1m 30s: it leaves a call nothing of its 1m 30s (`deadline_default`), so every call would be \
         rejected: use less, such as 9s",
    );
    let server = "deadline_max = '1s'\ndeadline_reserve = '999500us'";
    let told = ServerConfig::from_toml(server).unwrap().check().unwrap_err();
    assert!(told.to_string().contains("(`deadline_max`)"), "in whole milliseconds: {told}");
}

#[test]
fn queue_wait_beyond_the_deadline_is_an_error() {
    let base = "deadline_default = '90s'\nconnect_queue_wait = '5s'\n";
    one(
        &format!("{base}limit_queue_wait = '2m'"),
        &format!("{base}limit_queue_wait = '2m'\nlimit_queue = 0"),
        "`limit_queue_wait` is 2m: a call would wait for a permit longer than the 1m 30s of its deadline \
         (`deadline_default`): use less than that",
    );
    one(
        "deadline_default = '90s'\nconnect_queue_wait = '2m'",
        "deadline_default = '3m'\nconnect_queue_wait = '2m'",
        "`connect_queue_wait` is 2m: a call would wait for a connection longer than the 1m 30s of its deadline \
         (`deadline_default`): use less than that",
    );
    let server =
        ServerConfig::from_toml("deadline_default = '1s'\nlimit_queue_wait = '2s'").unwrap();
    assert!(server.check().unwrap_err().to_string().contains("limit_queue_wait"));
}

#[test]
fn maximum_idle_time_that_is_not_below_the_keep_alive_of_the_peer_is_an_error() {
    one(
        "connect_max_idle = '5s'\nconnect_peer_keep_alive = '5s'",
        "connect_max_idle = '4s'\nconnect_peer_keep_alive = '5s'",
        "`connect_max_idle` is 5s: the peer closes a connection that was idle for 5s (`connect_peer_keep_alive`), and a \
         request that is sent at that moment is lost: use less, such as 4s",
    );
    assert_eq!(told("connect_max_idle = 'off'\nconnect_peer_keep_alive = '75s'").len(), 1);
}

#[test]
fn retry_budget_that_never_permits_a_retry_is_an_error() {
    one(
        "retry_budget_ratio = 0.00001\nretry_budget_per_second = 0",
        "retry_budget_ratio = 0.00001\nretry_budget_per_second = 1",
        "`retry_budget_ratio` is 0.00001: without retries per second (`retry_budget_per_second`), the budget permits the \
         first retry only after 100000 calls: use a ratio such as 0.2, or 1 per second, or a `retry_attempts` of 1",
    );
    one(
        "retry_budget_cap = 0",
        "retry_budget_cap = 0\nretry_attempts = 1",
        "`retry_budget_cap` is 0: use 1 or more retries",
    );
    assert_eq!(
        told("retry_budget_ratio = 0"),
        ["`retry_budget_ratio` is 0.0: use a share above 0 and at most 10, such as 0.2"]
    );
}

#[test]
fn total_timeout_of_a_stream_is_an_error() {
    one(
        "streaming = true\ntimeout_total = '5m'",
        "streaming = true",
        "`timeout_total` is 5m: it cuts every stream (`streaming`) that lasts longer, however healthy: turn it off, and \
         bound silences by `timeout_response_idle`",
    );
    let response = told("streaming = true\ntimeout_response_total = '5m'");
    assert!(
        response[0].starts_with("`timeout_response_total` is 5m: it cuts every stream"),
        "{response:?}"
    );
    let llm = told("preset = 'llm'\ndeadline_default = '1h'");
    assert_eq!(llm.len(), 1);
    assert!(llm[0].starts_with("`deadline_default` is 1h: it cuts every stream"), "{llm:?}");
}

#[test]
fn response_total_that_the_total_always_precedes_is_an_error() {
    one(
        "timeout_total = '1m'\ntimeout_response_total = '1m'",
        "timeout_total = '1m'\ntimeout_response_total = '59s'",
        "`timeout_response_total` is 1m: the whole call is over after 1m (`timeout_total`), so this has no effect: use less, \
         or off",
    );
}

#[test]
fn error_of_a_layer_names_the_key_of_the_setting() {
    for (toml, key) in [
        ("retry_attempts = 0", "retry_attempts"),
        ("limit_max = 0", "limit_max"),
        ("limit_queue_wait = 0", "limit_queue_wait"),
        ("limit_max_unread = 0", "limit_max_unread"),
        ("breaker_failures = 0", "breaker_failures"),
        ("breaker_failure_ratio = 50", "breaker_failure_ratio"),
        ("breaker_half_open = 0", "breaker_half_open"),
        ("deadline_header = 'no such'", "deadline_header"),
        ("timeout_response_idle = 0", "timeout_response_idle"),
        ("timeout_first_frame = 0", "timeout_first_frame"),
        ("timeout_request_idle = 0", "timeout_request_idle"),
        ("timeout_request_stall = 0", "timeout_request_stall"),
        ("timeout_response_total = 0", "timeout_response_total"),
        ("timeout_min_body_rate = 0", "timeout_min_body_rate"),
        ("timeout_min_body_rate = 1\ntimeout_body_grace = 0", "timeout_body_grace"),
        ("timeout_body_grace = '9s'", "timeout_body_grace"),
        ("timeout_min_body_rate_for_grpc = true", "timeout_min_body_rate_for_grpc"),
        ("retry_backoff_max = '1ms'", "retry_backoff_max"),
        ("retry_attempt_timeout = 0", "retry_attempt_timeout"),
        ("breaker_open_for = 0", "breaker_open_for"),
        ("breaker_open_for_max = '1s'", "breaker_open_for_max"),
        ("breaker_probe_timeout = 0", "breaker_probe_timeout"),
        ("breaker_failure_ratio = 0.5\nbreaker_window = '1ms'", "breaker_window"),
        ("connect_max_total = 0", "connect_max_total"),
        ("connect_max_age = 0", "connect_max_age"),
        ("connect_queue_wait = 0", "connect_queue_wait"),
        ("check_health_uri = '/healthz'", "check_health_uri"),
        ("check_health_uri = 'a b'", "check_health_uri"),
        ("health_probe_uri = '/healthz'", "health_probe_uri"),
        ("health_probe_uri = 'healthz'", "health_probe_uri"),
        ("health_probe_every = '0s'", "health_probe_every"),
        ("health_probe_fall = 0", "health_probe_fall"),
        ("connect_jitter = 1", "connect_jitter"),
        ("connect_tcp_keepalive = '900ms'", "connect_tcp_keepalive"),
        ("connect_http2_keepalive = 0", "connect_http2_keepalive"),
        ("connect_http2_keepalive_timeout = 0", "connect_http2_keepalive_timeout"),
    ] {
        let told = told(toml);
        assert!(
            told.iter().any(|told| told.starts_with(&format!("`{key}` is "))),
            "{toml}: {told:?}"
        );
    }
}
