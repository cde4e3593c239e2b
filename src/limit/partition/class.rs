use std::{fmt, sync::Arc};

use http::{HeaderMap, Request};

use crate::{error::ConfigError, redact};

/// The class of a request: exempt, or a partition and a priority. A [`ClassifyCall`] returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallClass {
    pub(crate) exempt: bool,
    pub(crate) partition: Option<u8>,
    pub(crate) priority: Priority,
}

impl CallClass {
    /// Returns the class of exempt calls: such a call is never rejected, never waits, and is not counted as in flight.
    #[must_use]
    pub const fn exempt() -> Self {
        Self { exempt: true, partition: None, priority: Priority::NORMAL }
    }

    /// Sets the number of the partition, in the order of
    /// [`partitions`](super::layer::PartitionedLimitLayer::partitions), from 0. A call without a partition, or with a
    /// number that does not exist, has no share and only borrows.
    #[must_use]
    pub const fn partition(mut self, number: u8) -> Self {
        self.partition = Some(number);
        self
    }

    /// Sets the priority. [`Priority::NORMAL`] by default.
    #[must_use]
    pub const fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }
}

impl From<Priority> for CallClass {
    fn from(priority: Priority) -> Self {
        Self::default().priority(priority)
    }
}

/// The priority of a call: a level, and a lot within the level.
///
/// The lot is derived from a key that is the same in all services on the path of a request, such as a user, a session
/// or a trace. So every service rejects the same requests. With independent random lots, a request that needs four
/// calls from services at half of the required capacity would succeed in one of sixteen cases, instead of in one of two
/// (Zhou et al., "Overload Control for Scaling WeChat Microservices", SoCC 2018).
///
/// A client that can choose the key can choose its lot. At the edge, use a key that clients cannot choose.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(u16);

/// The number of bits of the lot.
pub(crate) const LOT_BITS: u32 = 7;
/// The number of levels.
const LEVELS: u16 = 8;
/// The number of priorities.
pub(crate) const PRIORITIES: usize = (LEVELS as usize) << LOT_BITS;

impl Priority {
    /// Level 1, which is rejected first.
    pub const SHEDDABLE: Self = Self::new(1);
    /// Level 4.
    pub const NORMAL: Self = Self::new(4);
    /// Level 7, which is rejected last.
    pub const CRITICAL: Self = Self::new(7);

    /// Returns a priority of this level, 0 to 7; 7 is the highest. Higher values count as 7.
    #[must_use]
    pub const fn new(level: u8) -> Self {
        let level = if (level as u16) < LEVELS { level as u16 } else { LEVELS - 1 };
        Self(level << LOT_BITS)
    }

    /// Sets the lot of this key: one of 128, equal in every process.
    ///
    /// The lot is the top 7 bits of the 64-bit FNV-1a hash of the key, after the finalizer of MurmurHash3 (`fmix64`).
    /// Keys that differ in one byte, such as consecutive numbers, have independent lots.
    #[must_use]
    pub fn with_key(self, key: impl AsRef<[u8]>) -> Self {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in key.as_ref() {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        // One multiplication follows the last byte, so its bits reach only a part of the hash. The finalizer spreads
        // them over all of it.
        hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        hash ^= hash >> 33;
        let lot = (hash >> (u64::BITS - LOT_BITS)) as u16;
        Self(self.0 >> LOT_BITS << LOT_BITS | lot)
    }

    /// Sets the lot of the trace id in the `traceparent` header (W3C Trace Context), which all calls on the path of a
    /// request carry. Without a trace id the lot stays as it is. At the edge, use it only if the `traceparent` of
    /// clients is replaced.
    #[must_use]
    pub fn with_trace_key(self, headers: &HeaderMap) -> Self {
        let parent = headers.get("traceparent").map(|value| value.as_bytes());
        // The format is `00-`, 32 digits of the trace id, `-`, and a part that changes with each hop.
        match parent.and_then(|parent| parent.get(3..35)) {
            Some(trace) => self.with_key(trace),
            None => self,
        }
    }

    /// Returns the level, 0 to 7.
    #[must_use]
    pub const fn level(self) -> u8 {
        (self.0 >> LOT_BITS) as u8
    }

    pub(crate) const fn numbered(number: u16) -> Self {
        Self(number)
    }

    pub(crate) const fn number(self) -> u16 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self::NORMAL
    }
}

impl fmt::Debug for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lot = self.0 & ((1 << LOT_BITS) - 1);
        f.debug_struct("Priority").field("level", &self.level()).field("lot", &lot).finish()
    }
}

// ===== Classifying requests =====

/// Classifies requests: returns the [`CallClass`] of each request. Implemented for closures over the request.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not classify requests of type `{Req}`",
    note = "`.classify_by(|request: &Req| CallClass::default())` needs exactly the request type of the service; `.exempt_paths(..)` needs `http::Request<B>`"
)]
pub trait ClassifyCall<Req>: Clone + Send + Sync + 'static {
    /// Returns the class of this request.
    fn classify(&self, request: &Req) -> CallClass;
}

impl<F, Req> ClassifyCall<Req> for F
where
    F: Fn(&Req) -> CallClass + Clone + Send + Sync + 'static,
{
    #[inline]
    fn classify(&self, request: &Req) -> CallClass {
        self(request)
    }
}

/// Exempts the calls of some paths ([`CallClass::exempt`]). Made by
/// [`exempt_paths`](super::super::layer::ConcurrencyLimitLayer::exempt_paths).
#[derive(Clone, Debug)]
pub struct ExemptPaths(Arc<[String]>);

impl ExemptPaths {
    pub(crate) fn new(paths: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self(paths.into_iter().map(Into::into).collect())
    }

    /// Rejects a path that can never be exempt, because it is ambiguous.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        const REMEDY: &str = "use a path without dot segments, backslashes and encoded dots, slashes or percent signs";
        match self.0.iter().find(|path| is_ambiguous(path)) {
            Some(path) => Err(ConfigError::new("exempt_paths", redact::Value(path), REMEDY)),
            None => Ok(()),
        }
    }

    /// Returns whether the path is exempt.
    fn has(&self, path: &str) -> bool {
        let matches = self.0.iter().any(|one| match one.strip_suffix("/*") {
            Some(above) => path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/')),
            None => path == one,
        });
        matches && !is_ambiguous(path)
    }
}

/// Returns whether a server behind the layer may read the path as another one: it has dot segments, backslashes, or
/// dots, slashes, backslashes or percent signs that are encoded (RFC 3986 §5.2.4, §6.2.2).
fn is_ambiguous(path: &str) -> bool {
    let is_encoded = |at: usize| {
        let code = path.as_bytes().get(at + 1..at + 3);
        code.is_none_or(|code| {
            [b"2e", b"2f", b"5c", b"25"].iter().any(|special| code.eq_ignore_ascii_case(*special))
        })
    };
    // Some servers ignore the parameters of a segment: `..;a`.
    let is_dots = |segment: &str| matches!(segment.split(';').next(), Some("." | ".."));
    path.contains('\\')
        || path.split('/').any(is_dots)
        || path.match_indices('%').any(|(at, _)| is_encoded(at))
}

impl<B> ClassifyCall<Request<B>> for ExemptPaths {
    fn classify(&self, request: &Request<B>) -> CallClass {
        if self.has(request.uri().path()) { CallClass::exempt() } else { CallClass::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_exempts_a_path_or_all_below_it() {
        let paths = ExemptPaths::new(["/livez", "/internal/*"]);
        for (path, exempt) in [
            ("/livez", true),
            ("/livez/", false),
            ("/livezz", false),
            ("/internal/a/b", true),
            ("/internal/", true),
            ("/internal", false),
            ("/internals", false),
            ("/", false),
        ] {
            assert_eq!(paths.has(path), exempt, "{path}");
        }
    }

    #[test]
    fn a_path_that_another_server_may_read_differently_is_never_exempt() {
        let paths = ExemptPaths::new(["/metrics/*", "/a/../b"]);
        for path in [
            "/metrics/../search",
            "/metrics/%2e%2e/search",
            "/metrics/%2E./search",
            "/metrics/..%2fsearch",
            "/metrics/..%2Fsearch",
            "/metrics/%252e%252e/search",
            "/metrics/..;a=b/search",
            "/metrics/./x",
            "/metrics/..",
            "/metrics/..\\search",
            "/metrics/%5csearch",
            "/metrics/%",
            "/metrics/%2",
            "/a/../b",
        ] {
            assert!(!paths.has(path), "{path}");
        }
        assert_eq!(paths.check().unwrap_err().field, "exempt_paths");
        assert!(ExemptPaths::new(["/metrics/*", "/livez"]).check().is_ok());
        for path in
            ["/metrics/a.b/..c", "/metrics/%41", "/metrics/a%20b", "/metrics/...", "/metrics//x"]
        {
            assert!(paths.has(path), "{path}");
        }
    }

    #[test]
    fn limit_priorities_are_by_level_and_then_by_lot() {
        let low = Priority::SHEDDABLE.with_key("anything");
        assert!(Priority::SHEDDABLE <= low && low < Priority::NORMAL);
        assert!(Priority::NORMAL.with_key("x") < Priority::CRITICAL);
        assert_eq!(Priority::new(200).level(), 7);
        assert!(usize::from(Priority::CRITICAL.with_key("y").number()) < PRIORITIES);
        assert_eq!(low.with_key("other").with_key("anything"), low);
        let lots: std::collections::HashSet<_> =
            (0..4000).map(|user| Priority::NORMAL.with_key(format!("user-{user}"))).collect();
        assert_eq!(lots.len(), 128);
    }

    #[test]
    fn consecutive_keys_draw_independent_lots() {
        const KEYS: u64 = 10_000;
        const HALF: u16 = 1 << (LOT_BITS - 1);
        type Key = fn(u64) -> Vec<u8>;
        let kinds: [(&str, Key); 5] = [
            ("user", |n| format!("user-{n}").into_bytes()),
            ("trace", |n| format!("{n:032x}").into_bytes()),
            ("uuid", |n| format!("6fa459ea-ee8a-4ca4-894e-{n:012x}").into_bytes()),
            ("big endian", |n| n.to_be_bytes().to_vec()),
            ("little endian", |n| n.to_le_bytes().to_vec()),
        ];
        for (kind, key) in kinds {
            let lot = |n| Priority::new(0).with_key(key(n)).number();
            let mut lots = [0_u64; 1 << LOT_BITS];
            (0..KEYS).for_each(|n| lots[usize::from(lot(n))] += 1);
            let mean = KEYS >> LOT_BITS;
            assert!(
                lots.iter().all(|count| (mean / 2..mean * 2).contains(count)),
                "{kind} {lots:?}"
            );
            // Pairs of keys that differ in the last byte: lower and lower half, lower and upper, and so on.
            for distance in [1, 2, 3, 16] {
                let mut pairs = [0_u64; 4];
                for n in 0..KEYS {
                    let (one, other) = (lot(n) >= HALF, lot(n + distance) >= HALF);
                    pairs[usize::from(one) * 2 + usize::from(other)] += 1;
                }
                for count in pairs {
                    let share = count as f64 / KEYS as f64;
                    assert!((share - 0.25).abs() <= 0.02, "{kind} {distance}: {pairs:?}");
                }
            }
        }
    }

    /// Other implementations compute the same lots.
    #[test]
    fn limit_lots_are_the_same_everywhere() {
        assert_eq!(
            format!("{:?}", Priority::NORMAL.with_key("user-1")),
            "Priority { level: 4, lot: 32 }"
        );
        let mut headers = HeaderMap::new();
        let drawn = |headers: &HeaderMap| Priority::NORMAL.with_trace_key(headers);
        assert_eq!(drawn(&headers), Priority::NORMAL);
        headers.insert("traceparent", "00".parse().unwrap());
        assert_eq!(drawn(&headers), Priority::NORMAL);
        let trace = "0af7651916cd43dd8448eb211c80319c";
        for hop in ["b7ad6b7169203331-01", "00f067aa0ba902b7-00"] {
            headers.insert("traceparent", format!("00-{trace}-{hop}").parse().unwrap());
            assert_eq!(drawn(&headers), Priority::NORMAL.with_key(trace));
        }
    }
}
