//! When a server asks to be called again.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, header};

/// The longest hint that is believed: 300 s, as Envoy's and linkerd's.
pub(crate) const LONGEST: Duration = Duration::from_secs(300);

/// gRPC's own hint (gRFC A6): a time in milliseconds; anything else means "do not retry".
pub(crate) const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The hint of a response head. The first that can be read counts, the most exact first:
///
/// 1. gRPC's pushback (gRFC A6), and nothing else where it says "not at all"
/// 2. `retry-after-ms` and `x-amz-retry-after`, milliseconds
/// 3. `Retry-After` (RFC 9110 §10.2.3)
/// 4. of a quota that is used up, when it begins anew: `RateLimit`, `RateLimit-Reset`, `X-RateLimit-Reset`
///    (draft-ietf-httpapi-ratelimit-headers, which gives `Retry-After` precedence)
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let hint = match pushback(headers) {
        Some(Pushback::After(after)) => after,
        Some(Pushback::Never) => return None,
        None => [MILLIS, AMAZONS]
            .iter()
            .find_map(|name| number(headers.get(*name)?).map(Duration::from_millis))
            .or_else(|| parse(headers.get(header::RETRY_AFTER)?, headers))
            .or_else(|| quota(headers))?,
    };
    Some(hint.min(LONGEST))
}

const MILLIS: &str = "retry-after-ms";
const AMAZONS: &str = "x-amz-retry-after";

/// A whole number. More digits than fit is still "a long time", and is clamped as such.
fn number(value: &HeaderValue) -> Option<u64> {
    digits(value.to_str().ok()?)
}

fn digits(text: &str) -> Option<u64> {
    let text = text.trim();
    let whole = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    whole.then(|| text.parse().unwrap_or(u64::MAX))
}

/// The response's own clock, or ours.
fn now(headers: &HeaderMap) -> SystemTime {
    let date = headers.get(header::DATE).and_then(|date| date.to_str().ok());
    date.and_then(|date| httpdate::parse_http_date(date).ok()).unwrap_or_else(SystemTime::now)
}

/// Whole seconds, or any of the three HTTP dates, against the response's own `Date` where it has one.
fn parse(value: &HeaderValue, headers: &HeaderMap) -> Option<Duration> {
    if let Some(seconds) = number(value) {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(value.to_str().ok()?.trim()).ok()?;
    Some(at.duration_since(now(headers)).unwrap_or_default())
}

// ===== Quotas =====

/// No list of quotas is read further than this.
const MOST_QUOTAS: usize = 16;

const RESETS: [(&str, &str); 2] =
    [("ratelimit-remaining", "ratelimit-reset"), ("x-ratelimit-remaining", "x-ratelimit-reset")];

/// When a quota that is used up begins anew.
fn quota(headers: &HeaderMap) -> Option<Duration> {
    let listed = headers.get("ratelimit").and_then(|value| rate_limit(value.to_str().ok()?));
    let reset = listed.or_else(|| {
        RESETS.iter().find_map(|(remaining, reset)| {
            let field = |name: &str| headers.get(name).map(number);
            // Nothing about what is left: what was asked for was refused, so nothing is.
            let used_up = field(remaining).is_none_or(|left| left == Some(0));
            field(reset).flatten().filter(|_| used_up)
        })
    })?;
    // Some send the second since 1970 at which it begins; no quota lasts thirty years.
    const EPOCH: u64 = 1_000_000_000;
    if reset < EPOCH {
        return Some(Duration::from_secs(reset));
    }
    let since = now(headers).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Some(Duration::from_secs(reset).saturating_sub(since))
}

/// `"name";r=0;t=30, …`, the longest of those that are used up; or, in older drafts, one quota as
/// `limit=100, remaining=0, reset=30`.
fn rate_limit(text: &str) -> Option<u64> {
    let mut longest = None;
    let (mut left, mut reset) = (None, None);
    for quota in text.split(',').take(MOST_QUOTAS) {
        for part in quota.split(';').take(MOST_QUOTAS) {
            let Some((name, value)) = part.split_once('=') else { continue };
            match name.trim() {
                "r" | "remaining" => left = digits(value),
                "t" | "reset" => reset = digits(value),
                _ => {}
            }
        }
        if left == Some(0) && reset.is_some() {
            longest = longest.max(reset);
        }
        // A name in quotes begins a quota of its own; members of the older form belong together.
        if quota.trim_start().starts_with('"') {
            (left, reset) = (None, None);
        }
    }
    longest
}

/// What a gRPC server says about a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushback {
    /// After this long.
    After(Duration),
    /// Not at all.
    Never,
}

/// gRFC A6: a negative or unparsable value means that there must be no retry.
pub(crate) fn pushback(headers: &HeaderMap) -> Option<Pushback> {
    let value = headers.get(PUSHBACK)?;
    // The number is a signed one of 32 bits.
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
    fn malformed_is_no_hint_and_huge_is_clamped() {
        for text in ["-1", "1.5", "soon", "", "12s", "١٢"] {
            let mut map = HeaderMap::new();
            map.insert("retry-after", HeaderValue::from_bytes(text.as_bytes()).unwrap());
            assert_eq!(retry_after(&map), None, "{text}");
        }
        for text in ["301", "99999999999999999999999999"] {
            assert_eq!(retry_after(&headers(&[("retry-after", text)])), Some(LONGEST));
        }
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
        fn fuzz_no_hint_panics_or_is_longer_than_is_believed(
            said in prop::collection::vec((
                prop::sample::select(vec![
                    PUSHBACK, MILLIS, AMAZONS, "retry-after", "date", "ratelimit", "ratelimit-remaining",
                    "ratelimit-reset", "x-ratelimit-remaining", "x-ratelimit-reset",
                ]),
                prop_oneof![
                    "-?[0-9]{1,30}",
                    "(\"?[a-z]{0,3}\"?[;,=]? ?(r|t|remaining|reset)?=?-?[0-9]{0,22}[;,]? ?){0,30}",
                    "(Sun|Mon|[A-Z][a-z]{2,5}day),? +[0-9]{1,2}[ -]Nov[ -][0-9]{2,5} [0-9:]{5,8} (GMT|[0-9]{4})",
                    ".{0,30}",
                ],
            ), 0..6),
        ) {
            let mut headers = HeaderMap::new();
            for (name, text) in said {
                if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
                    headers.append(name, value);
                }
            }
            let hint = retry_after(&headers);
            prop_assert!(hint.is_none_or(|hint| hint <= LONGEST));
            if pushback(&headers) == Some(Pushback::Never) {
                prop_assert_eq!(hint, None);
            }
        }

        #[test]
        fn fuzz_whole_numbers_are_read_as_they_are(number in any::<u64>(), date in any::<u32>()) {
            let of = |name: &'static str, text: String| {
                retry_after(&HeaderMap::from_iter([(name.parse().unwrap(), text.parse().unwrap())]))
            };
            let secs = Duration::from_secs(number).min(LONGEST);
            prop_assert_eq!(of("retry-after", number.to_string()), Some(secs));
            let millis = Duration::from_millis(number).min(LONGEST);
            prop_assert_eq!(of(MILLIS, number.to_string()), Some(millis));
            // And a date as far from the answer's own as it is.
            let (then, secs) = (SystemTime::UNIX_EPOCH + Duration::from_secs(date.into()), number % 400);
            let dates = [("date", 0), ("retry-after", secs)].map(|(name, secs)| {
                let text = httpdate::fmt_http_date(then + Duration::from_secs(secs));
                (name.parse().unwrap(), text.parse().unwrap())
            });
            let hint = retry_after(&HeaderMap::from_iter(dates));
            prop_assert_eq!(hint, Some(Duration::from_secs(secs).min(LONGEST)));
        }
    }
}
