//! The minimum rate of request bodies.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use http::{Method, Request, Version};
use tokio::time::Instant;

use super::phase_times::{OFF, PhaseLimit, UNSET};
use crate::outcome::grpc;

/// The time for which a body may keep its reader waiting, if no other is set.
pub(super) const DEFAULT_GRACE: Duration = Duration::from_secs(5);

/// The settings of the minimum rate of request bodies, as a [`TimeRequest`](super::protocol::TimeRequest) receives
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyRate {
    /// In bytes per second, or [`OFF`].
    pub(super) min: u32,
    /// In milliseconds.
    pub(super) grace_ms: u32,
    /// Whether gRPC requests have to keep the rate: 0 or 1.
    pub(super) grpc: u32,
}

impl BodyRate {
    pub(super) const UNSET: Self = Self { min: UNSET, grace_ms: UNSET, grpc: UNSET };

    /// Returns these settings. A setting that is not set is that of `other`.
    pub(super) fn or(self, other: Self) -> Self {
        let or = |this, other| if this == UNSET { other } else { this };
        Self {
            min: or(self.min, other.min),
            grace_ms: or(self.grace_ms, other.grace_ms),
            grpc: or(self.grpc, other.grpc),
        }
    }

    pub(super) fn min(self) -> Option<u32> {
        (!matches!(self.min, OFF | UNSET)).then_some(self.min)
    }

    pub(super) fn grace(self) -> Duration {
        match self.grace_ms {
            UNSET => DEFAULT_GRACE,
            ms => Duration::from_millis(ms.into()),
        }
    }

    pub(super) fn covers_grpc(self) -> bool {
        self.grpc == 1
    }

    /// Returns the rate that the body of this request has to keep. gRPC requests over HTTP/2 are exempt, because a
    /// client stream may pause for any time; so are tunnels. An upgraded connection of HTTP/1 is not a request
    /// body.
    pub(super) fn of<B>(self, request: &Request<B>) -> Self {
        let is_exempt = || {
            let is_grpc = request.version() >= Version::HTTP_2
                && grpc::is_grpc_call(request.method(), request.headers());
            request.method() == Method::CONNECT || is_grpc && !self.covers_grpc()
        };
        if self.min().is_none() || is_exempt() { Self::UNSET } else { self }
    }
}

/// The settings of a layer, which can change while it runs.
pub(super) struct SharedBodyRate([AtomicU32; 3]);

impl SharedBodyRate {
    pub(super) fn new(rate: BodyRate) -> Self {
        Self([rate.min, rate.grace_ms, rate.grpc].map(AtomicU32::new))
    }

    #[inline]
    pub(super) fn get(&self) -> BodyRate {
        let [min, grace_ms, grpc] = &self.0;
        BodyRate {
            min: min.load(Relaxed),
            grace_ms: grace_ms.load(Relaxed),
            grpc: grpc.load(Relaxed),
        }
    }

    pub(super) fn set(&self, rate: BodyRate) {
        for (shared, value) in self.0.iter().zip([rate.min, rate.grace_ms, rate.grpc]) {
            if value != UNSET {
                shared.store(value, Relaxed);
            }
        }
    }
}

/// The time for which a request body may still keep its reader waiting. It starts at the grace, and each byte adds the
/// time that it takes at the minimum rate, up to a maximum.
///
/// Only the task that polls the body writes it.
pub(super) struct Allowance {
    rate: u32,
    max_us: u64,
    left_us: AtomicU64,
}

/// The maximum of an allowance if there is no timeout for a body that is pending.
const MAX_ALLOWANCE: Duration = Duration::from_secs(60);

impl Allowance {
    /// Returns the allowance of one body. `None` if its rate is not limited. `silence` is the maximum time for which
    /// the body may be pending, and also the maximum of the allowance: a body that was fast so far may pause for that
    /// time, but not longer.
    pub(super) fn new(rate: BodyRate, silence: PhaseLimit) -> Option<Self> {
        let (min, grace) = (rate.min()?, rate.grace());
        let max = silence.time().unwrap_or(MAX_ALLOWANCE).max(grace);
        let (max_us, left_us) = (micros(max), AtomicU64::new(micros(grace)));
        Some(Self { rate: min, max_us, left_us })
    }

    pub(super) fn left(&self) -> Duration {
        Duration::from_micros(self.left_us.load(Relaxed))
    }

    /// Records a frame of this length, for which the reader has waited since `since`.
    pub(super) fn record(&self, bytes: usize, since: Option<Instant>) {
        let left = self.left_us.load(Relaxed);
        let waited = since.map_or(0, |since| micros(since.elapsed()));
        // If the wait was longer than the allowance, the reader polled late: otherwise its timer would have ended the
        // body. The delay is not attributed to the client.
        let left = left.checked_sub(waited).unwrap_or(left);
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let earned = bytes.saturating_mul(1_000_000) / u64::from(self.rate);
        self.left_us.store(left.saturating_add(earned).min(self.max_us), Relaxed);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn allowance(min: u32, grace_ms: u32) -> Allowance {
        let rate = BodyRate { min, grace_ms, grpc: 0 };
        Allowance::new(rate, PhaseLimit(60_000)).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_increase_the_allowance_up_to_its_maximum_and_waiting_decreases_it() {
        let allowance = allowance(240, 5000);
        assert_eq!(allowance.left(), Duration::from_secs(5));
        let since = Instant::now();
        advance(Duration::from_secs(3)).await;
        allowance.record(240, Some(since));
        assert_eq!(allowance.left(), Duration::from_secs(3));
        allowance.record(usize::MAX, None);
        assert_eq!(allowance.left(), Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn late_reader_is_not_charged() {
        let allowance = allowance(1, 5000);
        let since = Instant::now();
        advance(Duration::from_secs(600)).await;
        allowance.record(0, Some(since));
        assert_eq!(allowance.left(), Duration::from_secs(5));
    }

    #[test]
    fn exempt_requests_have_no_rate() {
        let rate = BodyRate { min: 240, grace_ms: 5000, grpc: UNSET };
        let request = |method, version, content_type| {
            let request = Request::builder().method(method).version(version);
            request.header("content-type", content_type).body(()).unwrap()
        };
        let (h1, h2, grpc) = (Version::HTTP_11, Version::HTTP_2, "application/grpc");
        for (method, version, content_type, has_rate) in [
            (Method::POST, h2, "application/json", true),
            (Method::POST, h2, grpc, false),
            (Method::POST, h2, "application/grpc+proto", false),
            // gRPC needs HTTP/2 and POST.
            (Method::POST, h1, grpc, true),
            (Method::PUT, h2, grpc, true),
            (Method::CONNECT, h2, "", false),
            (Method::CONNECT, h1, "", false),
        ] {
            let request = request(method, version, content_type);
            assert_eq!(rate.of(&request).min().is_some(), has_rate, "{request:?}");
            let strict = BodyRate { grpc: 1, ..rate }.of(&request).min().is_some();
            assert_eq!(strict, request.method() != Method::CONNECT, "{request:?}");
        }
    }
}
