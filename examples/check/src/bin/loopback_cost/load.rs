//! One run: as many callers as connections. Each caller makes its next call as soon as it has its response.

use std::{fs, io, time::Duration};

use buttress::BoxError;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty};
use tokio::{task::JoinSet, time::Instant};
use tower::ServiceExt;

use crate::{
    CONNECTIONS, RUN,
    sides::{Calls, Side},
};

pub struct Run {
    pub per_second: f64,
    /// In µs, to the end of the response.
    pub p50: f64,
    pub p99: f64,
    /// In µs per request. NaN if the system does not report it.
    pub cpu: f64,
}

pub async fn run<S: Calls>(side: &Side<S>) -> Result<Run, BoxError> {
    let (cpu, start) = (cpu_time(), Instant::now());
    let mut callers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        callers.spawn(call_on(side.client.clone(), side.uri.clone(), start));
    }
    let mut took = Vec::new();
    while let Some(calls) = callers.join_next().await {
        took.extend(calls??);
    }
    let (cpu, time) = (cpu_time() - cpu, start.elapsed());
    took.sort_unstable();
    let at = |share: f64| took[(share * (took.len() - 1) as f64) as usize].as_secs_f64() * 1e6;
    let calls = took.len() as f64;
    Ok(Run {
        per_second: calls / time.as_secs_f64(),
        p50: at(0.5),
        p99: at(0.99),
        cpu: cpu / 1000.0 / calls,
    })
}

/// Returns the duration of each call.
async fn call_on(client: impl Calls, uri: Uri, start: Instant) -> Result<Vec<Duration>, BoxError> {
    let mut took = Vec::with_capacity(1024);
    while start.elapsed() < RUN {
        let begun = Instant::now();
        let request = Request::get(uri.clone()).body(Empty::new())?;
        let response = client.clone().oneshot(request).await.map_err(Into::into)?;
        if !response.status().is_success() {
            return Err(format!("unexpected: {}", response.status()).into());
        }
        response.into_body().collect().await.map_err(Into::into)?;
        took.push(begun.elapsed());
    }
    Ok(took)
}

/// Returns the CPU time of all threads of this process in ns. NaN except on Linux.
fn cpu_time() -> f64 {
    let read = || -> io::Result<f64> {
        let mut nanos = 0.0;
        for thread in fs::read_dir("/proc/self/task")? {
            let stat = fs::read_to_string(thread?.path().join("schedstat"))?;
            nanos += stat.split(' ').next().unwrap_or_default().parse().unwrap_or(f64::NAN);
        }
        Ok(nanos)
    };
    read().unwrap_or(f64::NAN)
}
