//! When a server asks to be called again.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, header};

/// The longest hint that is believed: 300 s, as Envoy's and linkerd's.
pub(crate) const LONGEST: Duration = Duration::from_secs(300);

/// gRPC's own hint (gRFC A6): a time in milliseconds; anything else means "do not retry".
pub(crate) const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The hint of a response head: `Retry-After` (RFC 9110 §10.2.3), or gRPC's pushback.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let hint = match headers.get(header::RETRY_AFTER) {
        Some(value) => parse(value, headers.get(header::DATE))?,
        None => match pushback(headers)? {
            Pushback::After(after) => after,
            Pushback::Never => return None,
        },
    };
    Some(hint.min(LONGEST))
}

/// Whole seconds, or any of the three HTTP dates, against the response's own `Date` where it has one.
fn parse(value: &HeaderValue, date: Option<&HeaderValue>) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than a u64 holds is still "a long time", and is clamped as such.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    let now = date
        .and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok())
        .unwrap_or_else(SystemTime::now);
    Some(at.duration_since(now).unwrap_or_default())
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
    let ms = value.to_str().ok().and_then(|text| text.trim().parse::<u32>().ok());
    Some(ms.map_or(Pushback::Never, |ms| Pushback::After(Duration::from_millis(u64::from(ms)))))
}

#[cfg(test)]
mod tests {
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
    fn pushback_that_is_negative_or_unparsable_is_a_no() {
        for text in ["-1", "x", "1.5", ""] {
            assert_eq!(pushback(&headers(&[(PUSHBACK, text)])), Some(Pushback::Never), "{text}");
        }
        assert_eq!(
            pushback(&headers(&[(PUSHBACK, "25")])),
            Some(Pushback::After(Duration::from_millis(25)))
        );
        assert_eq!(pushback(&HeaderMap::new()), None);
    }
}
