//! What happens to the upstream, when, and what is sent at it meanwhile.

use std::time::Duration;

use tokio::time::Instant;

/// What each side is sent, whatever becomes of it: an open loop, as real users are one.
pub const CALLS_PER_SECOND: f64 = 100.0;
/// How long a user waits.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How many requests the upstream works on at once; what comes beyond queues up in it.
pub const WORKERS: usize = 10;
/// How long one request takes: 250 requests/s in all.
pub const FAST: Duration = Duration::from_millis(40);
/// The same while capacity is lost: 20 requests/s in all.
pub const SLOW: Duration = Duration::from_millis(500);
/// Even a healthy upstream answers one request in so many with a 503.
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

    /// When it begins, from the beginning of the script.
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

    /// Whether the upstream answers nothing but errors, or nothing at all.
    pub const fn is_outage(self) -> bool {
        matches!(self, Self::Unavailable | Self::Refusing)
    }
}

/// How long the whole script lasts.
pub fn length() -> Duration {
    Phase::Recovered.ends()
}

/// The one clock that both sides follow.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    pub fn starting_in(pause: Duration) -> Self {
        Self(Instant::now() + pause)
    }

    /// Zero until the script begins.
    pub fn now(self) -> Duration {
        Instant::now().saturating_duration_since(self.0)
    }

    pub fn phase(self) -> Phase {
        Phase::at(self.now())
    }

    /// Returns at once for a moment that has passed.
    pub async fn wait_until(self, since_start: Duration) {
        tokio::time::sleep_until(self.0 + since_start).await;
    }
}
