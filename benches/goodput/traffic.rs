//! An open loop of calls, and their results.

use std::time::Duration;

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};

use crate::world::{Call, Rejection};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Good,
    Bad,
    Rejected,
    GaveUp,
}

/// The result of one call.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Seconds since the first call.
    pub began: f64,
    pub took: f64,
    pub how: How,
}

impl Ended {
    pub fn at(&self) -> f64 {
        self.began + self.took
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    pub per_second: f64,
    pub length: Duration,
    /// The time after which a caller gives up.
    pub patience: Duration,
    /// Whether the calls arrive at random times (a Poisson process) or at even intervals.
    pub random: bool,
}

/// Makes calls at their times, whether or not the earlier ones have ended, and returns the results.
pub async fn offer(call: &Call, traffic: Traffic) -> Vec<Ended> {
    let mut dice = fastrand::Rng::with_seed(1);
    let (tell, mut told) = mpsc::unbounded_channel();
    let start = Instant::now();
    let mut next = 0.0;
    while next < traffic.length.as_secs_f64() {
        let at = start + Duration::from_secs_f64(next);
        if at > Instant::now() {
            sleep_until(at).await;
        }
        let (asked, tell) = (call(), tell.clone());
        tokio::spawn(async move {
            let began = Instant::now();
            let how = match timeout(traffic.patience, asked).await {
                Ok(Ok(response)) if response.status().is_success() => How::Good,
                Ok(Ok(_)) => How::Bad,
                Ok(Err(Rejection)) => How::Rejected,
                Err(_) => How::GaveUp,
            };
            let took = began.elapsed().as_secs_f64();
            let began = began.duration_since(start).as_secs_f64();
            // The receiver is gone if the run has been cut short.
            let _ = tell.send(Ended { began, took, how });
        });
        let pause = if traffic.random { -(1.0 - dice.f64()).ln() } else { 1.0 };
        next += pause / traffic.per_second;
    }
    drop(tell);
    let mut ended = Vec::new();
    while let Some(one) = told.recv().await {
        ended.push(one);
    }
    ended
}

// ===== Reading a run =====

/// Returns the successful responses per second between two times.
pub fn goodput(ended: &[Ended], from: f64, to: f64) -> f64 {
    let good = |one: &&Ended| one.how == How::Good && (from..to).contains(&one.at());
    ended.iter().filter(good).count() as f64 / (to - from)
}

/// Returns `value` for each second.
pub fn by_second(seconds: usize, value: impl Fn(f64, f64) -> f64) -> Vec<(f64, f64)> {
    (0..seconds).map(|s| s as f64).map(|from| (from + 0.5, value(from, from + 1.0))).collect()
}

/// Returns a quantile of the latencies of the successful responses between two times.
pub fn quantile(ended: &[Ended], share: f64, from: f64, to: f64) -> f64 {
    let good = ended.iter().filter(|one| one.how == How::Good && (from..to).contains(&one.at()));
    let mut took: Vec<f64> = good.map(|one| one.took).collect();
    if took.is_empty() {
        return f64::NAN;
    }
    let place = ((took.len() - 1) as f64 * share) as usize;
    *took.select_nth_unstable_by(place, f64::total_cmp).1
}
