//! Hints: the times to retry that servers state in response headers.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, header};

/// The maximum of a hint: 300 s, as in Envoy and linkerd. Longer hints are cut to it.
pub(crate) const MAX_HINT: Duration = Duration::from_secs(300);

/// The hint of gRPC (gRFC A6): a time in milliseconds. Any other value forbids a retry.
pub(crate) const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// Returns the hint of a response head: the first that can be parsed, in the order of their precision.
///
/// 1. gRPC's pushback (gRFC A6). If it forbids a retry, there is no hint.
/// 2. `retry-after-ms`, `x-ms-retry-after-ms` (Azure) and `x-amz-retry-after`, in milliseconds
/// 3. `Retry-After` (RFC 9110 §10.2.3)
/// 4. The reset time of a quota that is used up: `RateLimit`, `RateLimit-Reset`, `X-RateLimit-Reset-After` (Discord)
///    and `X-RateLimit-Reset` (draft-ietf-httpapi-ratelimit-headers, which gives `Retry-After` precedence)
///
/// Numbers may have decimals and are rounded up to the next millisecond. gRPC's pushback is an integer.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let hint = match pushback(headers) {
        Some(Pushback::After(after)) => after,
        Some(Pushback::Never) => return None,
        None => [MILLIS, AZURE_MILLIS, AMAZON_MILLIS]
            .iter()
            .find_map(|name| time(headers.get(*name)?, 1))
            .or_else(|| parse(headers.get(header::RETRY_AFTER)?, headers))
            .or_else(|| quota(headers))?,
    };
    Some(hint.min(MAX_HINT))
}

/// Hints in milliseconds.
const MILLIS: &str = "retry-after-ms";
const AZURE_MILLIS: &str = "x-ms-retry-after-ms";
const AMAZON_MILLIS: &str = "x-amz-retry-after";

/// The number of milliseconds in a second.
const SECOND: u64 = 1000;

/// Parses a time in units of `unit` milliseconds.
fn time(value: &HeaderValue, unit: u64) -> Option<Duration> {
    decimal(value.to_str().ok()?, unit).map(Duration::from_millis)
}

/// Parses a decimal number and returns `number × unit`, rounded up. A number that does not fit becomes `u64::MAX`,
/// which is later cut to [`MAX_HINT`].
fn decimal(text: &str, unit: u64) -> Option<u64> {
    let text = text.trim();
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    // Nine digits are exact in `u64`, and a further digit other than 0 only rounds up.
    let digits = &fraction[..fraction.len().min(9)];
    let rest = u64::from(fraction.bytes().skip(9).any(|b| b != b'0'));
    let scale = 10_u64.pow(digits.len() as u32);
    let part = digits.parse().unwrap_or(0_u64).saturating_mul(unit).saturating_add(rest);
    let whole = whole.parse().unwrap_or(u64::MAX).saturating_mul(unit);
    Some(whole.saturating_add(part.div_ceil(scale)))
}

/// Parses the remaining calls of a quota.
fn count(value: &HeaderValue) -> Option<u64> {
    decimal(value.to_str().ok()?, 1)
}

/// Returns the time of the response's `Date` header, or the system time without one.
fn now(headers: &HeaderMap) -> SystemTime {
    let date = headers.get(header::DATE).and_then(|date| date.to_str().ok());
    date.and_then(|date| httpdate::parse_http_date(date).ok()).unwrap_or_else(SystemTime::now)
}

/// Parses seconds, or any of the three HTTP dates relative to the response's own `Date` if it has one.
fn parse(value: &HeaderValue, headers: &HeaderMap) -> Option<Duration> {
    if let Some(time) = time(value, SECOND) {
        return Some(time);
    }
    let at = httpdate::parse_http_date(value.to_str().ok()?.trim()).ok()?;
    Some(at.duration_since(now(headers)).unwrap_or_default())
}

// ===== Quotas =====

/// The maximum number of quotas that are read of a list, and of parameters that are read of a quota.
const MAX_QUOTAS: usize = 16;

/// Pairs of headers: the remaining calls of a quota, and the seconds until its reset.
const RESETS: [(&str, &str); 3] = [
    ("ratelimit-remaining", "ratelimit-reset"),
    ("x-ratelimit-remaining", "x-ratelimit-reset-after"),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
];

/// Returns the time until the reset of a quota that is used up.
fn quota(headers: &HeaderMap) -> Option<Duration> {
    let listed = headers.get("ratelimit").and_then(|value| rate_limit(value.to_str().ok()?));
    let reset = listed.or_else(|| {
        RESETS.iter().find_map(|(remaining, reset)| {
            // The response rejects the call, so if it does not state the remaining calls, none remain.
            let is_used_up = headers.get(*remaining).is_none_or(|left| count(left) == Some(0));
            time(headers.get(*reset)?, SECOND).filter(|_| is_used_up)
        })
    })?;
    // Some servers send the reset as seconds since 1970. No quota lasts thirty years.
    const EPOCH: Duration = Duration::from_secs(1_000_000_000);
    if reset < EPOCH {
        return Some(reset);
    }
    let since = now(headers).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Some(reset.saturating_sub(since))
}

/// Parses a `RateLimit` header: `"name";r=0;t=30, …`, or a single quota as `limit=100, remaining=0, reset=30` in older
/// drafts. Returns the longest time to reset of the quotas that are used up.
fn rate_limit(text: &str) -> Option<Duration> {
    let mut max_reset = None;
    let (mut left, mut reset) = (None, None);
    for quota in text.split(',').take(MAX_QUOTAS) {
        for part in quota.split(';').take(MAX_QUOTAS) {
            let Some((name, value)) = part.split_once('=') else { continue };
            match name.trim() {
                "r" | "remaining" => left = decimal(value, 1),
                "t" | "reset" => reset = decimal(value, SECOND).map(Duration::from_millis),
                _ => {}
            }
        }
        if left == Some(0) && reset.is_some() {
            max_reset = max_reset.max(reset);
        }
        // A member with a name in quotes is a quota of its own. The members of the older form together are one quota.
        if quota.trim_start().starts_with('"') {
            (left, reset) = (None, None);
        }
    }
    max_reset
}

/// The instruction of a gRPC server about a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushback {
    /// Retry after this time.
    After(Duration),
    /// Do not retry.
    Never,
}

/// Returns the pushback. A negative or unparsable value forbids a retry (gRFC A6), and so do several values, as in
/// grpc-go's `shouldRetry`.
pub(crate) fn pushback(headers: &HeaderMap) -> Option<Pushback> {
    let mut values = headers.get_all(PUSHBACK).into_iter();
    let value = values.next()?;
    if values.next().is_some() {
        return Some(Pushback::Never);
    }
    // The value is a signed integer of 32 bits.
    let ms = value.to_str().ok().and_then(|text| text.trim().parse::<i32>().ok());
    let after = ms.and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis);
    Some(after.map_or(Pushback::Never, Pushback::After))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).collect()
    }

    #[test]
    fn seconds_and_the_three_dates() {
        let date = ("date", "Sun, 06 Nov 1994 08:49:07 GMT");
        for (text, secs) in [
            ("120", 120),
            (" 120 ", 120),
            ("0", 0),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 30),
            ("Sunday, 06-Nov-94 08:49:37 GMT", 30),
            ("Sun Nov  6 08:49:37 1994", 30),
            ("Sun, 06 Nov 1994 08:00:00 GMT", 0),
        ] {
            assert_eq!(
                retry_after(&headers(&[("retry-after", text), date])),
                Some(Duration::from_secs(secs)),
                "{text}"
            );
        }
    }

    #[test]
    fn malformed_value_is_no_hint_and_large_value_is_cut_to_the_maximum() {
        for text in ["-1", "1.", ".5", "1.5.5", "1,5", "1e3", "soon", "", "12s", "١٢"] {
            let mut map = HeaderMap::new();
            map.insert("retry-after", HeaderValue::from_bytes(text.as_bytes()).unwrap());
            assert_eq!(retry_after(&map), None, "{text}");
        }
        for text in ["301", "99999999999999999999999999"] {
            assert_eq!(retry_after(&headers(&[("retry-after", text)])), Some(MAX_HINT));
        }
    }

    #[test]
    fn decimals_are_rounded_up_to_the_next_millisecond() {
        for (name, text, micros) in [
            ("retry-after", "2.0", 2_000_000),
            ("retry-after", "0.25", 250_000),
            ("retry-after", "0.0001", 1000),
            ("retry-after", "1.0000000001", 1_001_000),
            ("retry-after", "1.2340000000", 1_234_000),
            ("retry-after-ms", "12.1", 13_000),
            ("x-ms-retry-after-ms", "250", 250_000),
            ("x-amz-retry-after", "0.5", 1000),
            ("x-ratelimit-reset-after", "0.123", 123_000),
            ("x-ratelimit-reset-after", "64.57", 64_570_000),
            ("ratelimit", "\"a\";r=0;t=1.5", 1_500_000),
        ] {
            let hint = retry_after(&headers(&[(name, text)]));
            assert_eq!(hint, Some(Duration::from_micros(micros)), "{name}: {text}");
        }
    }

    #[test]
    fn relative_reset_has_precedence_over_absolute_reset() {
        let pairs = [("x-ratelimit-reset", "1470173023"), ("x-ratelimit-reset-after", "1.5")];
        assert_eq!(retry_after(&headers(&pairs)), Some(Duration::from_millis(1500)));
        let left = ("x-ratelimit-remaining", "3");
        assert_eq!(retry_after(&headers(&[pairs[1], left])), None);
    }

    #[test]
    fn several_pushback_values_forbid_a_retry() {
        let pairs = [(PUSHBACK, "10"), (PUSHBACK, "10")];
        let mut both = HeaderMap::new();
        for (name, value) in pairs {
            both.append(name, value.parse().unwrap());
        }
        assert_eq!(pushback(&both), Some(Pushback::Never));
        assert_eq!(retry_after(&both), None);
    }

    #[test]
    fn the_most_exact_that_can_be_read_counts() {
        let after = ("retry-after", "7");
        let amazons = ("x-amz-retry-after", "1500");
        let millis = ("retry-after-ms", "250");
        let quota = ("ratelimit", "\"a\";r=0;t=9");
        for (pairs, ms) in [
            (&[quota, after][..], 7000),
            (&[quota, after, amazons], 1500),
            (&[quota, after, amazons, millis], 250),
            (&[after, millis, (PUSHBACK, "20")], 20),
            (&[quota, ("retry-after", "soon"), ("retry-after-ms", "-1")], 9000),
        ] {
            assert_eq!(retry_after(&headers(pairs)), Some(Duration::from_millis(ms)), "{pairs:?}");
        }
        assert_eq!(retry_after(&headers(&[after, (PUSHBACK, "-1")])), None);
    }

    #[test]
    fn a_quota_that_is_used_up_says_when_it_begins_anew() {
        let date = ("date", "Sun, 09 Sep 2001 01:46:40 GMT"); // 1 000 000 000
        for (pairs, secs) in [
            (&[("ratelimit", "\"a\";r=0;t=30")][..], Some(30)),
            (&[("ratelimit", "\"a\";r=1;t=30")], None),
            (&[("ratelimit", "\"a\";t=30")], None),
            (&[("ratelimit", "\"a\";r=0;t=30, \"b\"; r=0; t=45, \"c\";r=9;t=60")], Some(45)),
            (&[("ratelimit", "\"a\";r=0, \"b\";t=45")], None),
            (&[("ratelimit", "limit=100, remaining=0, reset=30")], Some(30)),
            (&[("ratelimit", "limit=100, remaining=1, reset=30")], None),
            (&[("ratelimit", "=;=,,r=;t=x")], None),
            (&[("ratelimit-reset", "12")], Some(12)),
            (&[("ratelimit-reset", "12"), ("ratelimit-remaining", "0")], Some(12)),
            (&[("ratelimit-reset", "12"), ("ratelimit-remaining", "3")], None),
            (&[("ratelimit-reset", "12"), ("ratelimit-remaining", "x")], None),
            (&[("x-ratelimit-reset", "1000000042"), date], Some(42)),
            (&[("x-ratelimit-reset", "1000000000"), date], Some(0)),
            (&[("x-ratelimit-reset", "99999999999999999999"), date], Some(300)),
        ] {
            assert_eq!(retry_after(&headers(pairs)), secs.map(Duration::from_secs), "{pairs:?}");
        }
    }

    #[test]
    fn pushback_that_is_negative_or_unparsable_is_a_no() {
        for text in ["-1", "x", "1.5", "", "2147483648"] {
            assert_eq!(pushback(&headers(&[(PUSHBACK, text)])), Some(Pushback::Never), "{text}");
        }
        assert_eq!(
            pushback(&headers(&[(PUSHBACK, "25")])),
            Some(Pushback::After(Duration::from_millis(25)))
        );
        assert_eq!(pushback(&HeaderMap::new()), None);
    }

    proptest! {
        #[test]
        fn fuzz_hint_neither_panics_nor_exceeds_the_maximum(
            hint_headers in prop::collection::vec((
                prop::sample::select(vec![
                    PUSHBACK, MILLIS, AZURE_MILLIS, AMAZON_MILLIS, "retry-after", "x-ratelimit-reset-after", "date", "ratelimit", "ratelimit-remaining",
                    "ratelimit-reset", "x-ratelimit-remaining", "x-ratelimit-reset",
                ]),
                prop_oneof![
                    "-?[0-9]{0,30}\\.?[0-9]{0,30}",
                    "(\"?[a-z]{0,3}\"?[;,=]? ?(r|t|remaining|reset)?=?-?[0-9]{0,22}[;,]? ?){0,30}",
                    "(Sun|Mon|[A-Z][a-z]{2,5}day),? +[0-9]{1,2}[ -]Nov[ -][0-9]{2,5} [0-9:]{5,8} (GMT|[0-9]{4})",
                    ".{0,30}",
                ],
            ), 0..6),
        ) {
            let mut headers = HeaderMap::new();
            for (name, text) in hint_headers {
                if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
                    headers.append(name, value);
                }
            }
            let hint = retry_after(&headers);
            prop_assert!(hint.is_none_or(|hint| hint <= MAX_HINT));
            if pushback(&headers) == Some(Pushback::Never) {
                prop_assert_eq!(hint, None);
            }
        }

        #[test]
        fn fuzz_whole_numbers_are_read_as_they_are(number in any::<u64>(), date in any::<u32>()) {
            let of = |name: &'static str, text: String| {
                retry_after(&HeaderMap::from_iter([(name.parse().unwrap(), text.parse().unwrap())]))
            };
            let secs = Duration::from_secs(number).min(MAX_HINT);
            prop_assert_eq!(of("retry-after", number.to_string()), Some(secs));
            let millis = Duration::from_millis(number).min(MAX_HINT);
            prop_assert_eq!(of(MILLIS, number.to_string()), Some(millis));
            // A date is relative to the `Date` of the response.
            let (then, secs) = (SystemTime::UNIX_EPOCH + Duration::from_secs(date.into()), number % 400);
            let dates = [("date", 0), ("retry-after", secs)].map(|(name, secs)| {
                let text = httpdate::fmt_http_date(then + Duration::from_secs(secs));
                (name.parse().unwrap(), text.parse().unwrap())
            });
            let hint = retry_after(&HeaderMap::from_iter(dates));
            prop_assert_eq!(hint, Some(Duration::from_secs(secs).min(MAX_HINT)));
        }
    }
}
