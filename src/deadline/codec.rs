use std::{fmt, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};

/// The encoding of the time left in a header, in addition to gRPC's.
///
/// ```
/// use std::time::Duration;
/// use buttress::deadline::{Codec, DeadlineLayer};
/// use http::HeaderMap;
///
/// /// Whole seconds, as `x-wait`.
/// struct Seconds;
///
/// impl Codec for Seconds {
///     fn read(&self, headers: &HeaderMap) -> Option<Duration> {
///         headers.get("x-wait")?.to_str().ok()?.parse().ok().map(Duration::from_secs)
///     }
///
///     fn write(&self, left: Duration, headers: &mut HeaderMap) {
///         headers.insert("x-wait", left.as_secs().max(1).into());
///     }
///
///     fn resolution(&self) -> Duration {
///         Duration::from_secs(1)
///     }
/// }
///
/// let layer = DeadlineLayer::new().codec(Seconds);
/// # let _ = layer;
/// ```
pub trait Codec: Send + Sync + 'static {
    /// Returns the time left. `None` if the header is absent or cannot be parsed.
    fn read(&self, headers: &HeaderMap) -> Option<Duration>;

    /// Writes the time left. Must round down, except that it may round zero up.
    fn write(&self, left: Duration, headers: &mut HeaderMap);

    /// Returns the unit to which [`write`](Self::write) rounds down. 1 ms by default.
    ///
    /// If two deadline layers of a stack use the same header, the inner layer reads the time that the outer layer has
    /// written. A time that is at most one unit below the deadline in the extensions repeats that deadline, and the
    /// deadline keeps its [source](crate::time::Deadline::source).
    fn resolution(&self) -> Duration {
        Duration::from_millis(1)
    }
}

/// Whole milliseconds in a header of this name.
#[derive(Clone, Debug)]
pub(super) struct Millis(pub(super) HeaderName);

impl Codec for Millis {
    fn read(&self, headers: &HeaderMap) -> Option<Duration> {
        let text = headers.get(&self.0)?.to_str().ok()?;
        digits(text).map(Duration::from_millis)
    }

    fn write(&self, left: Duration, headers: &mut HeaderMap) {
        // Some servers, such as Envoy, interpret 0 as "no limit".
        let ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
        headers.insert(self.0.clone(), HeaderValue::from(ms));
    }
}

fn digits(text: &str) -> Option<u64> {
    let whole = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    whole.then(|| text.parse().unwrap_or(u64::MAX))
}

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The encoding of `grpc-timeout`: up to eight digits and a unit (PROTOCOL-HTTP2, "Timeout").
pub(super) struct GrpcTimeout;

const UNITS: [(char, u64); 6] = [
    ('n', 1),
    ('u', 1_000),
    ('m', 1_000_000),
    ('S', 1_000_000_000),
    ('M', 60_000_000_000),
    ('H', 3_600_000_000_000),
];
const MAX_NUMBER: u128 = 99_999_999;

impl Codec for GrpcTimeout {
    fn read(&self, headers: &HeaderMap) -> Option<Duration> {
        let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
        let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let (_, nanos) = UNITS.iter().find(|(letter, _)| unit.starts_with(*letter))?;
        let number = digits(number).filter(|_| number.len() <= 8)?;
        let (secs, nanos) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
        // Cannot overflow: 99,999,999 hours are fewer seconds than `u64::MAX`, and `nanos` is below 10^9.
        Some(Duration::from_secs(number * secs) + Duration::from_nanos(number * nanos))
    }

    fn write(&self, left: Duration, headers: &mut HeaderMap) {
        let nanos = left.as_nanos();
        let fits = |(_, unit): &&(char, u64)| nanos / u128::from(*unit) <= MAX_NUMBER;
        let (letter, unit) = UNITS.iter().find(fits).copied().unwrap_or(('H', u64::MAX));
        let number = (nanos / u128::from(unit)).clamp(1, MAX_NUMBER);
        if let Ok(value) = HeaderValue::try_from(format!("{number}{letter}")) {
            headers.insert(GRPC_TIMEOUT, value);
        }
    }
}

impl fmt::Debug for dyn Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Codec")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn grpc(text: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, HeaderValue::from_bytes(text.as_bytes()).unwrap());
        GrpcTimeout.read(&headers)
    }

    #[test]
    fn grpc_timeout_is_read_as_in_its_specification() {
        for (text, time) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("100m", Duration::from_millis(100)),
            ("99999999u", Duration::from_micros(99_999_999)),
            ("82n", Duration::from_nanos(82)),
            ("0m", Duration::ZERO),
            ("99999999H", Duration::from_secs(359_999_996_400)),
        ] {
            assert_eq!(grpc(text), Some(time), "{text}");
        }
        for text in ["", "m", "1", "1x", "-1m", "+1m", "1.5S", "100000000m", " 1m", "1 m", "1é"] {
            assert_eq!(grpc(text), None, "{text}");
        }
    }

    #[test]
    fn written_time_is_rounded_down() {
        for nanos in [1, 82, 99_999_999, 100_000_001, 99_999_999_999, u64::MAX] {
            let (left, mut headers) = (Duration::from_nanos(nanos), HeaderMap::new());
            GrpcTimeout.write(left, &mut headers);
            let read = GrpcTimeout.read(&headers).unwrap();
            assert!(
                read <= left && left - read < left / 1_000 + Duration::from_nanos(1),
                "{left:?}"
            );
        }
        let mut headers = HeaderMap::new();
        GrpcTimeout.write(Duration::MAX, &mut headers);
        assert!(GrpcTimeout.read(&headers).is_some());
        let millis = Millis(HeaderName::from_static("x-left"));
        millis.write(Duration::from_micros(1999), &mut headers);
        assert_eq!(millis.read(&headers), Some(Duration::from_millis(1)));
        millis.write(Duration::from_nanos(1), &mut headers);
        assert_eq!(millis.read(&headers), Some(Duration::from_millis(1)), "0 would mean no limit");
        for (text, read) in [("99999999999999999999999", true), ("-5", false), ("5s", false)] {
            headers.insert("x-left", text.parse().unwrap());
            assert_eq!(millis.read(&headers).is_some(), read, "{text}");
        }
    }

    proptest! {
        #[test]
        fn fuzz_any_header_is_read_or_ignored(text in "([0-9]{1,9}[HMSmunx]|.{0,12})") {
            let millis = Millis(HeaderName::from_static("x-left"));
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
                headers.insert(GRPC_TIMEOUT, value.clone());
                headers.insert("x-left", value);
            }
            if let Some(time) = GrpcTimeout.read(&headers) {
                prop_assert!(text.len() <= 9 && time <= Duration::from_secs(99_999_999 * 3600));
            }
            prop_assert_eq!(millis.read(&headers).is_some(), digits(&text).is_some());
        }

        #[test]
        fn fuzz_any_written_time_is_rounded_down(left in any::<Duration>()) {
            let millis = Millis(HeaderName::from_static("x-left"));
            let max = Duration::from_secs(99_999_999 * 3600);
            for (codec, exact) in [(&GrpcTimeout as &dyn Codec, Duration::ZERO), (&millis, Duration::from_millis(1))] {
                let mut headers = HeaderMap::new();
                codec.write(left, &mut headers);
                let read = codec.read(&headers).unwrap();
                prop_assert!(read <= left.max(exact).max(Duration::from_nanos(1)), "{read:?} of {left:?}");
                let lost = left.min(max).saturating_sub(read);
                prop_assert!(lost <= exact.max(left / 1_000), "{read:?} of {left:?}");
            }
        }
    }
}
