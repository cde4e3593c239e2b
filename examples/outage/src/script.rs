//! The phases of the upstream and the load.

use std::time::Duration;

use tokio::time::Instant;

/// The load of each side. It is an open loop: calls do not wait for earlier calls.
pub const CALLS_PER_SECOND: f64 = 100.0;
/// The time after which a caller gives up.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// The number of requests that the upstream works on at once. Further requests wait in its queue.
pub const WORKERS: usize = 10;
/// The time of a request. The capacity is 250 requests/s.
pub const FAST: Duration = Duration::from_millis(40);
/// The time of a request in the slow phase. The capacity is 20 requests/s.
pub const SLOW: Duration = Duration::from_millis(500);
/// A healthy upstream responds to one of this many requests with 503.
pub const BLIPS: u32 = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Healthy,
    Slow,
    Unavailable,
    Refusing,
    Recovered,
}

impl Phase {
    pub const ALL: [Self; 5] =
        [Self::Healthy, Self::Slow, Self::Unavailable, Self::Refusing, Self::Recovered];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Slow => "slow",
            Self::Unavailable => "503",
            Self::Refusing => "refusing",
            Self::Recovered => "healthy again",
        }
    }

    const fn lasts(self) -> Duration {
        Duration::from_millis(match self {
            Self::Healthy => 3500,
            Self::Slow => 5500,
            Self::Unavailable | Self::Refusing => 2500,
            Self::Recovered => 6000,
        })
    }

    /// Returns the beginning of the phase, from the start of the script.
    pub fn begins(self) -> Duration {
        Self::ALL.into_iter().take_while(|phase| *phase != self).map(Self::lasts).sum()
    }

    pub fn ends(self) -> Duration {
        self.begins() + self.lasts()
    }

    pub fn at(since_start: Duration) -> Self {
        Self::ALL.into_iter().find(|phase| since_start < phase.ends()).unwrap_or(Self::Recovered)
    }

    pub const fn is_healthy(self) -> bool {
        matches!(self, Self::Healthy | Self::Recovered)
    }

    /// Returns whether no request can succeed in this phase.
    pub const fn is_outage(self) -> bool {
        matches!(self, Self::Unavailable | Self::Refusing)
    }
}

/// Returns the duration of the script.
pub fn length() -> Duration {
    Phase::Recovered.ends()
}

/// The clock of both sides.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    pub fn starting_in(pause: Duration) -> Self {
        Self(Instant::now() + pause)
    }

    /// Returns the time since the start of the script, or zero before it.
    pub fn now(self) -> Duration {
        Instant::now().saturating_duration_since(self.0)
    }

    pub fn phase(self) -> Phase {
        Phase::at(self.now())
    }

    /// Waits until a moment of the script. Returns at once if it has passed.
    pub async fn wait_until(self, since_start: Duration) {
        tokio::time::sleep_until(self.0 + since_start).await;
    }
}
