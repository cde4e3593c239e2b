//! Streams through whole default stacks, client and server, with their connections, on a paused clock.

use std::{io, time::Duration};

use axum::{Router, body::Body, routing::get};
use buttress::{
    BoxError, Rejected,
    config::{ClientConfig, ConfigPreset, ServerConfig},
    outcome::RejectedKind,
    stack::{ClientHandle, ClientStack, ServerHandle},
    timeout::TimeoutPhase,
};
use bytes::Bytes;
use futures_util::stream;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt};

use crate::support::{pipe::Pipe, secs};

/// A body of 15 frames, one every 20 s, and then its end or silence.
fn frames(ends: bool) -> Body {
    Body::from_stream(stream::unfold(0, move |nth| async move {
        match nth {
            15 if ends => None,
            15 => std::future::pending().await,
            nth => {
                sleep(secs(20)).await;
                Some((Ok::<_, BoxError>(Bytes::from_static(b"frame")), nth + 1))
            }
        }
    }))
}

fn connector(
    app: Router,
) -> impl Service<Uri, Response = Pipe, Error = io::Error, Future: Send> + Clone + Send + Sync + 'static
{
    tower::service_fn(move |_| {
        let service = TowerToHyperService::new(app.clone());
        async move {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move {
                let server = auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(theirs), service).await;
            });
            Ok(Pipe::new(ours))
        }
    })
}

type Ended = (usize, Duration, Option<RejectedKind>);

struct Both {
    client: ClientConfig,
    server: ServerConfig,
}

impl Both {
    /// Reads a stream through both stacks. Returns the number of frames, the duration, and the rejection that ended it.
    async fn read(&self, path: &str, pause: Duration) -> (Ended, ClientHandle, ServerHandle) {
        let server = buttress::server(&self.server).unwrap();
        let app = Router::new()
            .route("/ends", get(async || frames(true)))
            .route("/silent", get(async || frames(false)))
            .layer(server.clone());
        let connections = &self.client.connect;
        let builder = connections.client(connections.layer().unwrap());
        let stack = ClientStack::new(&self.client).unwrap();
        let client = stack.layer(builder.build(connector(app)));
        let request =
            Request::get(format!("http://llm{path}")).body(Empty::<Bytes>::new()).unwrap();
        let start = Instant::now();
        let mut body = client.oneshot(request).await.unwrap().into_body();
        let (mut frames, mut why) = (0, None);
        while let Some(frame) = body.frame().await {
            match frame {
                // HTTP/2 may end a stream with an empty frame.
                Ok(frame) => {
                    frames += usize::from(frame.data_ref().is_some_and(|data| !data.is_empty()))
                }
                Err(error) => why = Rejected::find(&*error).map(Rejected::kind),
            }
            sleep(pause).await;
        }
        let took = start.elapsed();
        drop(body);
        // Time for the server to observe the end.
        sleep(secs(1)).await;
        ((frames, took, why), stack.handle(), server.handle())
    }
}

fn all() -> impl Iterator<Item = Both> {
    let presets = [None, Some(ConfigPreset::Slow), Some(ConfigPreset::Llm)];
    let both = presets.into_iter().flat_map(|preset| [(preset, false), (preset, true)]);
    both.map(|(preset, http2)| {
        let mut client = preset.map_or_else(ClientConfig::default, ClientConfig::preset);
        client.connect.http2_only = http2;
        let server = preset.map_or_else(ServerConfig::default, ServerConfig::preset);
        Both { client, server }
    })
}

#[tokio::test(start_paused = true)]
async fn five_minutes_with_a_frame_every_20_seconds_pass_whole_stacks_as_they_are() {
    for both in all() {
        let ((frames, took, why), client, server) = both.read("/ends", Duration::ZERO).await;
        assert_eq!((frames, took.as_secs(), why), (15, 300, None), "{}", both.client.explain());
        for seen in [client.snapshot(), server.snapshot()] {
            assert_eq!((seen.successes, seen.total, seen.in_flight, seen.timeouts), (1, 1, 0, 0));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_takes_an_hour_for_a_frame_is_not_ended_by_whole_stacks() {
    for both in all() {
        let ((frames, took, why), client, server) = both.read("/ends", secs(3600)).await;
        assert_eq!((frames, why), (15, None));
        assert!(took >= secs(15 * 3600));
        for seen in [client.snapshot(), server.snapshot()] {
            assert_eq!((seen.successes, seen.failures, seen.timeouts), (1, 0, 0));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_stalls_is_a_failure_after_the_idle_time_of_whole_stacks() {
    for both in all() {
        let idle = both.client.timeout.response_idle.unwrap();
        let ((frames, took, why), client, server) = both.read("/silent", Duration::ZERO).await;
        assert_eq!((frames, why), (15, Some(RejectedKind::TimedOut(TimeoutPhase::Idle))));
        assert_eq!(took.as_secs(), 300 + idle.as_secs());
        let seen = client.snapshot();
        assert_eq!((seen.successes, seen.failures, seen.timeouts, seen.in_flight), (0, 1, 1, 0));
        assert_eq!(server.snapshot().in_flight, 0, "the call of the server has ended");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_through_the_preset_internal_is_cut_off_at_its_deadline() {
    let both = Both {
        client: ClientConfig::preset(ConfigPreset::Internal),
        server: ServerConfig::default(),
    };
    let ((frames, took, why), ..) = both.read("/ends", Duration::ZERO).await;
    assert_eq!(
        (frames, took.as_secs()),
        (0, 5),
        "the deadline passes before the first frame: {why:?}"
    );
}
