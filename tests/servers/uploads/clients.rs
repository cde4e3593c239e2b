//! hyper, reqwest and tonic.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::time::Instant;

use super::{
    UPLOAD,
    results::Results,
    servers::{REJECTS, SERVED, start},
};
use crate::support::{alone, net::soon};

async fn hyper(addr: SocketAddr, http2: bool) -> Result<StatusCode, String> {
    let client: Client<_, Full<Bytes>> =
        Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
    let body = Full::new(Bytes::from(vec![0; UPLOAD]));
    let request = Request::post(format!("http://{addr}/")).body(body).unwrap();
    let response = soon(client.request(request)).await.map_err(|error| format!("{error:?}"))?;
    let status = response.status();
    let body = soon(response.into_body().collect()).await;
    body.map(|_| status).map_err(|error| format!("{error:?}"))
}

async fn reqwest(addr: SocketAddr) -> Result<StatusCode, String> {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let upload = client.post(format!("http://{addr}/")).body(vec![0; UPLOAD]).send();
    let response = soon(upload).await.map_err(|error| format!("{error:?}"))?;
    let status = response.status();
    soon(response.bytes()).await.map(|_| status).map_err(|error| format!("{error:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_of_each_layer_reaches_hyper_and_reqwest() {
    let _alone = alone().await;
    let mut results = Results::default();
    for rejects in REJECTS {
        for served in SERVED {
            let server = start(served, rejects).await;
            for attempt in 0..6 {
                let began = Instant::now();
                let (client, result) = match attempt % 3 {
                    0 => ("hyper", hyper(server.addr, false).await),
                    1 => ("hyper over HTTP/2", hyper(server.addr, true).await),
                    _ => ("reqwest", reqwest(server.addr).await),
                };
                let what = format!("{client}, {rejects:?} under {served:?}");
                results.add(&what, result.map(|status| status.as_u16()), began.elapsed());
            }
        }
    }
    results.assert_all_arrived(120);
}

mod grpc {
    use std::{
        pin::Pin,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::SeqCst},
        },
        task::{Context, Poll},
        time::Duration,
    };

    use buttress::{CircuitBreakerLayer, ConcurrencyLimitLayer};
    use http_body::{Body, Frame};
    use http_body_util::Channel;
    use hyper_util::rt::TokioIo;
    use tokio::net::TcpStream;
    use tonic::transport::{Server, server::TcpIncoming};
    use tower::{Layer, ServiceExt, service_fn};

    use super::*;
    use crate::support::net::listener;

    fn call<B>(uri: &str, body: B) -> Request<B> {
        Request::post(uri)
            .version(http::Version::HTTP_2)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(body)
            .unwrap()
    }

    /// The client sends messages without an end.
    #[tokio::test]
    async fn stream_that_is_rejected_ends_after_a_second() {
        let (tcp, addr) = listener().await;
        let limit = ConcurrencyLimitLayer::new(1);
        let _permit = limit.handle().try_acquire().unwrap();
        let (_, health) = tonic_health::server::health_reporter();
        let server = Server::builder().layer(limit.respond()).add_service(health);
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(tcp)));

        let tcp = TokioIo::new(TcpStream::connect(addr).await.unwrap());
        let (mut client, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), tcp).await.unwrap();
        tokio::spawn(connection);
        let (mut messages, body) = Channel::<Bytes, Infallible>::new(1);
        let uri = format!("http://{addr}/grpc.health.v1.Health/Watch");
        let began = Instant::now();
        let response = soon(client.send_request(call(&uri, body))).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "14");
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        while messages.send_data(Bytes::from_static(&[0; 64])).await.is_ok() {
            assert!(began.elapsed() < Duration::from_secs(5), "the stream goes on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(began.elapsed() > Duration::from_millis(900), "{:?}", began.elapsed());
    }

    struct Messages(Arc<AtomicUsize>);

    impl Body for Messages {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.fetch_add(1, SeqCst);
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"message")))))
        }
    }

    /// The body of a client's request belongs to the application: the layer has nothing to drain.
    #[tokio::test(start_paused = true)]
    async fn messages_of_rejected_client_call_are_not_polled() {
        let breaker = CircuitBreakerLayer::http();
        breaker.handle().force_open();
        let channel = service_fn(async |_: Request<tonic::body::Body>| {
            Ok::<_, Infallible>(http::Response::new(tonic::body::Body::empty()))
        });
        let polls = Arc::new(AtomicUsize::new(0));
        let body = tonic::body::Body::new(Messages(polls.clone()));
        let service = breaker.respond().layer(channel);
        let response = service.oneshot(call("/grpc.health.v1.Health/Watch", body)).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "14");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(polls.load(SeqCst), 0);
    }
}
