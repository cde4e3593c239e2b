//! The load: an open loop of calls.

use std::{sync::Arc, time::Duration};

use axum::http::{Request, Response, StatusCode};
use buttress::{BoxError, Rejected};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy;
use tokio::{task::JoinSet, time::timeout};
use tower::{Service, ServiceExt};

use crate::{
    script::{self, CALLS_PER_SECOND, Clock, PATIENCE},
    tally::{Answer, Call, Tally},
};

pub type Body = Empty<Bytes>;

/// Returns the times of the calls, which are random, but the same for both sides.
pub fn arrivals() -> Vec<Duration> {
    let mut rng = fastrand::Rng::with_seed(42);
    let mut at = 0.0;
    let gaps = std::iter::repeat_with(move || {
        at += -(1.0 - rng.f64()).ln() / CALLS_PER_SECOND;
        Duration::from_secs_f64(at)
    });
    gaps.take_while(|at| *at < script::length()).collect()
}

/// Makes every call at its time, whether or not earlier calls have ended. Returns when the last call has ended.
pub async fn drive<S, B>(client: S, url: String, clock: Clock, tally: Arc<Tally>)
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    let mut calls = JoinSet::new();
    for at in arrivals() {
        clock.wait_until(at).await;
        while calls.try_join_next().is_some() {}
        let (client, url, tally) = (client.clone(), url.clone(), tally.clone());
        tally.begin();
        calls.spawn(async move {
            let answer = match timeout(PATIENCE, call(client, url)).await {
                Ok(Ok(StatusCode::OK)) => Answer::Good,
                Ok(Ok(status)) => Answer::Status(status.as_u16()),
                Ok(Err(error)) => failure(&*error),
                Err(_) => Answer::TimedOut,
            };
            // The duration counts from the planned time of the call, so that a late generator does not shorten it.
            let ended = clock.now();
            tally.end(Call { at, ended, answer });
        });
    }
    calls.join_all().await;
}

async fn call<S, B>(client: S, url: String) -> Result<StatusCode, BoxError>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: http_body::Body<Error: Into<BoxError>>,
{
    let request = Request::get(url).body(Body::new())?;
    let response = client.oneshot(request).await.map_err(Into::into)?;
    let status = response.status();
    response.into_body().collect().await.map_err(Into::into)?;
    Ok(status)
}

fn failure(error: &(dyn std::error::Error + 'static)) -> Answer {
    if let Some(refused) = Rejected::find(error) {
        return Answer::Refused(refused.kind().as_str());
    }
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<legacy::Error>().is_some_and(legacy::Error::is_connect) {
            return Answer::NoConnection;
        }
        next = error.source();
    }
    Answer::ConnectionLost
}
