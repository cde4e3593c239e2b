//! Checks each setting, and the settings against each other. Each error states the remedy.

use std::{fmt::Display, time::Duration};

use super::{
    group::SettingsGroup,
    layers::{BreakerConfig, CallsConfig, DeadlineConfig, LimitConfig, TimeoutConfig},
    load::{ConfigErrors, Source},
    stack::{ClientConfig, ServerConfig},
};
use crate::{error::ConfigError, redact};

impl ClientConfig {
    /// Checks each setting, and the settings against each other.
    ///
    /// # Errors
    ///
    /// Returns an error for each invalid setting and for each conflict between settings, with the remedy.
    pub fn check(&self) -> Result<(), ConfigErrors> {
        ConfigErrors::none_of(CLIENT.iter().flat_map(|rule| rule(self)).collect())
    }
}

impl ServerConfig {
    /// Checks each setting, and the settings against each other.
    ///
    /// # Errors
    ///
    /// Returns an error for each invalid setting and for each conflict between settings, with the remedy.
    pub fn check(&self) -> Result<(), ConfigErrors> {
        ConfigErrors::none_of(SERVER.iter().flat_map(|rule| rule(self)).collect())
    }
}

/// A check of a configuration, which returns the errors that it finds.
type ConfigRule<C> = fn(&C) -> Vec<ConfigError>;

const CLIENT: &[ConfigRule<ClientConfig>] = &[
    |c| {
        let layers = [
            with_key(&c.deadline, c.deadline.layer().err()),
            with_key(&c.retry, c.retry.layer().err()),
            with_key(&c.hedge, c.hedge.layer().err()),
            with_key(&c.breaker, c.breaker.layer().err()),
            with_key(&c.limit, c.limit.layer().err()),
            with_key(&c.timeout, c.timeout.layer().err()),
            with_key(&c.health_probe, c.health_probe.layer::<()>().err()),
        ];
        layers.into_iter().flatten().collect()
    },
    |c| attempts_exceed_deadline(c).into_iter().collect(),
    |c| attempts_exceed_breaker_threshold(c),
    |c| attempt_shorter_than_connect(c).into_iter().collect(),
    |c| count_cancelled_after_exceeds_attempt(c).into_iter().collect(),
    |c| hedge_after_exceeds_attempt(c).into_iter().collect(),
    |c| max_hedges_without_delay(c).into_iter().collect(),
    |c| reserve_exceeds_deadline(&c.deadline),
    |c| limit_queue_wait_exceeds_deadline(&c.limit, &c.deadline).into_iter().collect(),
    |c| connect_queue_wait_exceeds_deadline(c).into_iter().collect(),
    |c| max_idle_exceeds_peer_keep_alive(c).into_iter().collect(),
    |c| retry_budget_too_small(c).into_iter().collect(),
    |c| total_timeout_of_streams(&c.calls, &c.timeout, &c.deadline),
    |c| response_total_exceeds_total(&c.timeout).into_iter().collect(),
    |c| body_rate_settings_without_rate(&c.timeout),
    |c| invalid_connect_settings(c),
    relative_health_uris,
];

const SERVER: &[ConfigRule<ServerConfig>] = &[
    |c| {
        let layers = [
            with_key(&c.deadline, c.deadline.layer().err()),
            with_key(&c.limit, c.limit.layer().err()),
            with_key(&c.timeout, c.timeout.layer().err()),
        ];
        layers.into_iter().flatten().collect()
    },
    |c| limit_queue_wait_exceeds_deadline(&c.limit, &c.deadline).into_iter().collect(),
    |c| reserve_exceeds_deadline(&c.deadline),
    |c| total_timeout_of_streams(&c.calls, &c.timeout, &c.deadline),
    |c| response_total_exceeds_total(&c.timeout).into_iter().collect(),
    |c| body_rate_settings_without_rate(&c.timeout),
];

/// Replaces the name of the setter in an error of a layer by the key of the setting.
fn with_key(group: &dyn SettingsGroup, error: Option<ConfigError>) -> Option<ConfigError> {
    let mut error = error?;
    let setter = error.field.strip_prefix("trip.").unwrap_or(error.field).replace('.', "_");
    let name = match &*setter {
        "default_of" => "default",
        "delay" => "after",
        "after_percentile" => "percentile",
        "consecutive" => "failures",
        "within" => "window",
        "limit" => "max",
        "get" => "uri",
        "thresholds_rise" => "rise",
        "thresholds_fall" => "fall",
        "queue_length" => "queue",
        "queue_max_wait" => "queue_wait",
        same => same,
    };
    let row = group.rows().iter().find(|row| row.key.strip_prefix(group.prefix()) == Some(name));
    if let Some(row) = row {
        error.field = row.key;
    }
    Some(error)
}

/// Returns a time as a text. Fractions of a millisecond are left out, except for a time below 1 ms.
fn show(time: Duration) -> String {
    let whole = u64::try_from(time.as_millis()).map_or(time, Duration::from_millis);
    let time = if whole.is_zero() { time } else { whole };
    humantime::format_duration(time).to_string()
}

fn conflict(field: &'static str, value: impl Display, remedy: String) -> Option<ConfigError> {
    Some(ConfigError::new(field, format_args!("{value}"), remedy))
}

/// Returns the maximum time of an attempt up to its response head, and the key of the setting that determines it.
fn attempt(c: &ClientConfig) -> Option<(Duration, &'static str)> {
    let bounds = [
        (c.timeout.head, "timeout_head"),
        (c.retry.attempt_timeout, "retry_attempt_timeout"),
        (c.timeout.total, "timeout_total"),
        (c.timeout.response_total, "timeout_response_total"),
    ];
    bounds.into_iter().filter_map(|(time, name)| Some((time?, name))).min()
}

/// Rejects attempts whose timeouts exceed the deadline in total.
fn attempts_exceed_deadline(c: &ClientConfig) -> Option<ConfigError> {
    let ((each, name), deadline) = (attempt(c)?, c.deadline.default?);
    let attempts = c.retry.attempts.max(1);
    let all = each.saturating_mul(attempts);
    if all <= deadline || attempts == 1 {
        return None;
    }
    let fit = (deadline.as_nanos() / each.as_nanos().max(1)).clamp(1, u128::from(attempts) - 1);
    let remedy = format!(
        "{attempts} attempts of up to {} each (`{name}`) take {}, over the deadline of {} (`deadline_default`): use at most {fit}, \
         or a `{name}` of at most {}, or a deadline of at least {}",
        show(each),
        show(all),
        show(deadline),
        show(deadline / attempts),
        show(all),
    );
    conflict("retry_attempts", attempts, remedy)
}

/// Rejects a `count_cancelled_after` that has no effect, because a timeout ends each attempt first and is a failure
/// itself. Only a value that the configuration sets is an error; a timeout shorter than the default is not.
fn count_cancelled_after_exceeds_attempt(c: &ClientConfig) -> Option<ConfigError> {
    const KEY: &str = "breaker_count_cancelled_after";
    let ((max, name), after) = (attempt(c)?, c.breaker.count_cancelled_after?);
    let is_chosen = !matches!(c.source(KEY), Some(Source::Default | Source::Preset(_)) | None)
        || c.breaker.count_cancelled_after != BreakerConfig::default().count_cancelled_after
            && c.source(KEY) == Some(Source::Default);
    if !c.breaker.is_on() || after < max || !is_chosen {
        return None;
    }
    let remedy = format!(
        "an attempt is over after {} (`{name}`), which is a failure already, so this has no effect: use less, or off",
        show(max),
    );
    conflict(KEY, show(after), remedy)
}

/// Rejects hedge attempts that are never sent. Hedging is part of an attempt of the retry, and each hedge attempt has
/// timeouts of its own. No hedge attempt is sent after the first attempt has timed out.
fn hedge_after_exceeds_attempt(c: &ClientConfig) -> Option<ConfigError> {
    let ((max, name), after) = (attempt(c)?, c.hedge.after?);
    let (hedges, last) = (c.hedge.max_hedges, after.saturating_mul(c.hedge.max_hedges));
    if after < max && last < max {
        return None;
    }
    if after < max {
        let fit = (max.as_nanos() - 1) / after.as_nanos().max(1);
        let remedy = format!(
            "an attempt is over after {} (`{name}`), before the last hedge attempt, each sent {} (`hedge_after`) after the \
             previous one: use at most {fit}, or a `{name}` of more than {}",
            show(max),
            show(after),
            show(last),
        );
        return conflict("hedge_max_hedges", hedges, remedy);
    }
    let remedy = format!(
        "an attempt is over after {} (`{name}`), before the hedge attempt is sent: use less, or a `{name}` of more than {}",
        show(max),
        show(after),
    );
    conflict("hedge_after", show(after), remedy)
}

/// Rejects a number of hedge attempts without a delay.
fn max_hedges_without_delay(c: &ClientConfig) -> Option<ConfigError> {
    let hedges = c.hedge.max_hedges;
    if hedges <= 1 || c.hedge.is_on() {
        return None;
    }
    let remedy = "without `hedge_after` or `hedge_percentile` this has no effect: set one of them, or leave this out";
    conflict("hedge_max_hedges", hedges, remedy.to_owned())
}

/// Rejects a number of attempts with which a single call can open the circuit.
fn attempts_exceed_breaker_threshold(c: &ClientConfig) -> Vec<ConfigError> {
    let attempts = c.retry.attempts;
    let share = c.breaker.failure_ratio.map(|_| c.breaker.min_calls);
    let run =
        c.breaker.failures.map(|failures| ("breaker_failures", failures, "failures in a row"));
    let share = share.map(|calls| ("breaker_min_calls", calls, "calls, if all of them fail"));
    let short = run.into_iter().chain(share).filter(|(_, min, _)| (1..attempts).contains(min));
    short
        .filter_map(|(key, min, of_what)| {
            let remedy = format!(
                "one call alone would open the circuit, which takes {min} {of_what} (`{key}`), and its attempts after that \
                 would be rejected: use at most {min} attempts, or a `{key}` of at least {attempts}",
            );
            conflict("retry_attempts", attempts, remedy)
        })
        .collect()
}

/// Rejects a timeout of an attempt that is below the timeout of the connect, which is a part of the attempt.
fn attempt_shorter_than_connect(c: &ClientConfig) -> Option<ConfigError> {
    let ((each, name), connect) = (attempt(c)?, c.connect.timeout);
    if each >= connect {
        return None;
    }
    let remedy = format!(
        "an attempt includes the connect, whose timeout of {} (`connect_timeout`) would never expire: use more than that, or a \
         `connect_timeout` of less than {}",
        show(connect),
        show(each),
    );
    conflict(name, show(each), remedy)
}

/// Rejects a reserved time that leaves a call no time before its deadline.
fn reserve_exceeds_deadline(deadline: &DeadlineConfig) -> Vec<ConfigError> {
    // The layer rounds times up to whole milliseconds.
    let whole = |time: Duration| time.as_nanos().div_ceil(1_000_000);
    let kept = deadline.reserve.unwrap_or_default();
    let bounds = [("deadline_default", deadline.default), ("deadline_max", deadline.max)];
    let spent = bounds.into_iter().filter_map(|(key, time)| Some((key, time?)));
    // The check of the layer reports a bound of zero.
    let spent = spent.filter(|(_, time)| whole(*time) <= whole(kept) && !time.is_zero());
    spent
        .filter_map(|(key, time)| {
            let remedy = format!(
                "it leaves a call nothing of its {} (`{key}`), so every call would be rejected: use less, such as {}",
                show(time),
                show(time / 10),
            );
            conflict("deadline_reserve", show(kept), remedy)
        })
        .collect()
}

/// Rejects a maximum wait for a permit that exceeds the deadline.
fn limit_queue_wait_exceeds_deadline(
    limit: &LimitConfig,
    deadline: &DeadlineConfig,
) -> Option<ConfigError> {
    let waits = limit.max.is_some() && limit.queue > 0;
    let deadline = deadline.default.filter(|deadline| waits && limit.queue_wait > *deadline)?;
    let remedy = format!(
        "a call would wait for a permit longer than the {} of its deadline (`deadline_default`): use less than that",
        show(deadline),
    );
    conflict("limit_queue_wait", show(limit.queue_wait), remedy)
}

/// Rejects a maximum wait for a connection that exceeds the deadline, if the application has set it. The deadline ends
/// the wait of a default or a preset, which has no effect at all for a stack around a client of the application.
fn connect_queue_wait_exceeds_deadline(c: &ClientConfig) -> Option<ConfigError> {
    let (wait, deadline) = (c.connect.queue_wait, c.deadline.default?);
    if c.connect.queue == 0 || wait <= deadline {
        return None;
    }
    let chosen = c.chosen(&[&c.connect]);
    chosen.iter().find(|(key, _)| *key == "connect_queue_wait")?;
    let remedy = format!(
        "a call would wait for a connection longer than the {} of its deadline (`deadline_default`): use less than that",
        show(deadline),
    );
    conflict("connect_queue_wait", show(wait), remedy)
}

/// Rejects a maximum idle time that is not below the keep-alive time of the peer.
fn max_idle_exceeds_peer_keep_alive(c: &ClientConfig) -> Option<ConfigError> {
    let peer = c.connect.peer_keep_alive?;
    let idle = c.connect.max_idle;
    if idle.is_some_and(|idle| idle < peer) {
        return None;
    }
    let remedy = format!(
        "the peer closes a connection that was idle for {} (`connect_peer_keep_alive`), and a request that is sent at that \
         moment is lost: use less, such as {}",
        show(peer),
        show(peer / 5 * 4),
    );
    conflict("connect_max_idle", idle.map_or_else(|| "off".to_owned(), show), remedy)
}

/// Rejects a retry budget that permits fewer than one retry in 10,000 calls.
fn retry_budget_too_small(c: &ClientConfig) -> Option<ConfigError> {
    // The check of the layer reports an invalid budget.
    let retry = &c.retry;
    let valid = retry.budget_ratio > 0.0 && retry.budget_cap > 0;
    if retry.attempts <= 1 || !valid || retry.budget_per_second > 0 {
        return None;
    }
    let calls = (1.0 / retry.budget_ratio).ceil();
    if calls <= 10_000.0 {
        return None;
    }
    let remedy = format!(
        "without retries per second (`retry_budget_per_second`), the budget permits the first retry only after {calls} calls: \
         use a ratio such as 0.2, or 1 per second, or a `retry_attempts` of 1",
    );
    conflict("retry_budget_ratio", retry.budget_ratio, remedy)
}

/// Rejects a timeout of a whole call if responses are long streams.
fn total_timeout_of_streams(
    calls: &CallsConfig,
    timeout: &TimeoutConfig,
    deadline: &DeadlineConfig,
) -> Vec<ConfigError> {
    let bounds = [
        ("timeout_total", timeout.total),
        ("timeout_response_total", timeout.response_total),
        ("deadline_default", deadline.default),
    ];
    let bounds = bounds.into_iter().filter(|_| calls.streaming);
    bounds
        .filter_map(|(key, time)| {
            let remedy = "it cuts every stream (`streaming`) that lasts longer, however healthy: turn it off, and bound \
                          silences by `timeout_response_idle`";
            conflict(key, show(time?), remedy.to_owned())
        })
        .collect()
}

/// Rejects a timeout of the whole response that the timeout of the whole call always precedes.
fn response_total_exceeds_total(timeout: &TimeoutConfig) -> Option<ConfigError> {
    let (total, response) = (timeout.total?, timeout.response_total?);
    if response < total {
        return None;
    }
    let remedy = format!(
        "the whole call is over after {} (`timeout_total`), so this has no effect: use less, or off",
        show(total),
    );
    conflict("timeout_response_total", show(response), remedy)
}

/// Rejects settings of the minimum body rate if no minimum body rate is set.
fn body_rate_settings_without_rate(timeout: &TimeoutConfig) -> Vec<ConfigError> {
    let default = TimeoutConfig::default();
    let grace = timeout.body_grace != default.body_grace;
    let settings = [
        (grace, "timeout_body_grace", show(timeout.body_grace)),
        (timeout.min_body_rate_for_grpc, "timeout_min_body_rate_for_grpc", "true".to_owned()),
    ];
    let remedy = "without a `timeout_min_body_rate` this has no effect: set one, or leave this out";
    let without_effect = |set: bool| set && timeout.min_body_rate.is_none();
    let settings = settings.into_iter().filter(|(set, ..)| without_effect(*set));
    settings.filter_map(|(_, key, value)| conflict(key, value, remedy.to_owned())).collect()
}

/// Rejects URIs of health checks that are not absolute.
fn relative_health_uris(c: &ClientConfig) -> Vec<ConfigError> {
    let is_absolute =
        |uri: &str| http::Uri::try_from(uri).is_ok_and(|uri| uri.authority().is_some());
    let check = c.check_health.uri.as_deref().filter(|uri| !is_absolute(uri));
    // The layer reports every other text that is not a URI.
    let probe = c.health_probe.uri.as_deref().filter(|uri| uri.starts_with('/'));
    let relative = [("check_health_uri", check), ("health_probe_uri", probe)];
    let errors = relative.into_iter().filter_map(|(key, uri)| {
        let remedy = "use an absolute URI, such as http://search:8080/healthz";
        conflict(key, redact::value(uri?), remedy.to_owned())
    });
    errors.collect()
}

/// Rejects invalid settings of the connections. They are checked here, because `ConnectLayer` needs the feature
/// `connect`.
fn invalid_connect_settings(c: &ClientConfig) -> Vec<ConfigError> {
    let connect = &c.connect;
    let numbers =
        [("connect_max_total", connect.max_total), ("connect_max_per_host", connect.max_per_host)];
    let numbers = numbers.into_iter().filter(|(_, number)| *number == Some(0));
    let times = [
        ("connect_timeout", Some(connect.timeout)),
        ("connect_max_age", connect.max_age),
        ("connect_max_idle", connect.max_idle),
        ("connect_http2_keepalive", connect.http2_keepalive),
        ("connect_http2_keepalive_timeout", Some(connect.http2_keepalive_timeout)),
    ];
    let times = times.into_iter().filter(|(_, time)| *time == Some(Duration::ZERO));
    let tcp = connect.tcp_keepalive.filter(|time| *time < Duration::from_secs(1));
    let tcp = tcp
        .map(|time| conflict("connect_tcp_keepalive", show(time), "use 1s or more, or off".into()));
    let jitter = connect.jitter;
    let odd = !(0.0..=0.9).contains(&jitter);
    let odd = odd.then(|| conflict("connect_jitter", jitter, "use 0 to 0.9".into()));
    let wait = connect.queue_wait;
    let short = connect.queue > 0 && wait < Duration::from_millis(1);
    let short = short.then(|| {
        conflict("connect_queue_wait", show(wait), "use 1ms or more, or a queue of 0".to_owned())
    });
    let numbers = numbers.filter_map(|(key, _)| conflict(key, 0, "use 1 or more, or off".into()));
    let times = times
        .filter_map(|(key, time)| conflict(key, show(time?), "use a time above zero".to_owned()));
    let more = [tcp, odd, short].into_iter().flatten().flatten();
    numbers.chain(times).chain(more).collect()
}
