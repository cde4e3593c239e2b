//! Callers that send any kind of request, and hang up at any point.

use std::{
    future::Future,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{BoxError, Rejected};
use bytes::Bytes;
use fastrand::Rng;
use futures_util::{FutureExt, StreamExt, stream};
use http::{Method, Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use tokio::time::{sleep, timeout};
use tower::ServiceExt;

use crate::{
    clients::{Body, Calls},
    tally::Tally,
    verdict::panics,
};

/// The time after which a call counts as hung. Far longer than the deadline of any call.
const HANGS: Duration = Duration::from_secs(10);

pub async fn call_on(
    client: impl Calls,
    server: SocketAddr,
    mut random: Rng,
    tally: Arc<Tally>,
    over: Arc<AtomicBool>,
) {
    while !over.load(SeqCst) {
        let call = client.clone().oneshot(request(server, &mut random));
        let mut answer = pin!(read(call, random.u8(..100)));
        match random.u8(..100) {
            0..3 => tally.count("never polled"),
            3..8 => {
                let _ = answer.as_mut().now_or_never();
                tally.count("polled once");
            }
            8..20 => match timeout(Duration::from_micros(random.u64(..20_000)), answer).await {
                Ok(end) => tally.end(end),
                Err(_) => tally.count("given up"),
            },
            _ => match timeout(HANGS, answer).await {
                Ok(end) => tally.end(end),
                Err(_) => tally.count(Tally::HUNG),
            },
        }
        sleep(Duration::from_micros(random.u64(..5000))).await;
    }
}

/// Returns the result of a call. Reads the response to its end, in part, or not at all.
async fn read<B>(
    call: impl Future<Output = Result<http::Response<B>, BoxError>>,
    how: u8,
) -> Result<StatusCode, &'static str>
where
    B: http_body::Body<Error: Into<BoxError>>,
{
    let why = |error: BoxError| Rejected::find(&*error).map_or("other", |no| no.kind().as_str());
    let response = call.await.map_err(why)?;
    let (status, mut body) = (response.status(), pin!(response.into_body()));
    let frames = match how {
        0..10 => 0,
        10..20 => 1,
        _ => usize::MAX,
    };
    for _ in 0..frames {
        match body.as_mut().frame().await {
            None => break,
            Some(frame) => frame.map(drop).map_err(|error| why(error.into()))?,
        }
    }
    Ok(status)
}

/// Makes a call that must succeed.
pub async fn get(client: impl Calls, server: SocketAddr) -> Result<(), BoxError> {
    let request = Request::get(format!("http://{server}/slow/3")).body(Body::default())?;
    let response = client.oneshot(request).await?;
    if response.status() != StatusCode::OK {
        return Err(response.status().to_string().into());
    }
    response.into_body().collect().await.map_err(Into::into)?;
    Ok(())
}

// ===== Requests =====

fn request(server: SocketAddr, random: &mut Rng) -> Request<Body> {
    let (method, path) = match random.u8(..100) {
        0..40 => (Method::GET, "/".into()),
        40..60 => ([Method::PUT, Method::POST][random.usize(..2)].clone(), "/echo".into()),
        60..70 => (Method::GET, format!("/slow/{}", random.u8(..40))),
        70..80 => (Method::GET, format!("/stream/{}", random.u8(..8))),
        80..87 => ([Method::GET, Method::POST][random.usize(..2)].clone(), "/fails".into()),
        87..89 => (Method::GET, "/throttles".into()),
        89..91 => (Method::GET, "/hangs".into()),
        91..93 => (Method::GET, "/panics".into()),
        93..96 => (Method::GET, "/breaks_off".into()),
        96..98 => (Method::GET, format!("/silent/{}", random.u8(..2))),
        _ => (Method::GET, "/panics_later".into()),
    };
    let body = if path == "/echo" { body(random) } else { Body::default() };
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = format!("http://{server}{path}").parse().expect("a URI");
    request
}

/// Returns a body of any size. Some bodies fail, stall or panic.
fn body(random: &mut Rng) -> Body {
    let chunk = Bytes::from(vec![b'x'; random.usize(..20_000)]);
    let end = random.u8(..30);
    if end > 10 {
        return Full::new(chunk).map_err(|never| match never {}).boxed_unsync();
    }
    let chunks = stream::iter(0..random.u8(1..8)).then(move |n| {
        let chunk = chunk.clone();
        async move {
            sleep(Duration::from_millis(1)).await;
            match (n, end) {
                (3.., 0) => panics(),
                (2.., 1) => std::future::pending().await,
                (1.., 2) => Err(std::io::ErrorKind::BrokenPipe.into()),
                _ => Ok(Frame::data(chunk)),
            }
        }
    });
    StreamBody::new(chunks).boxed_unsync()
}
