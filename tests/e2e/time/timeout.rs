//! Timeouts of requests that are sent slowly, over real sockets.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use buttress::{
    BoxError, Rejected, TimeoutLayer, Timeouts, outcome::RejectedKind, timeout::TimeoutPhase,
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Request, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    time::{Instant, sleep},
};
use tower::{Layer, ServiceExt};

use crate::support::{ms, net};

const LENGTH: usize = 16 * 1024 * 1024;

/// Starts a server for one connection. It reads the request in at most this many pieces, with a pause before each, and
/// responds at the end of the request.
async fn takes(pieces: usize, pause: Duration) -> SocketAddr {
    // Small socket buffers, so that the kernels hold as little of the request as possible.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(32 * 1024).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let (mut buffer, mut taken) = (vec![0; 64 * 1024], 0);
        for _ in 0..pieces {
            sleep(pause).await;
            match tcp.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(read) => taken += read,
            }
            if taken >= LENGTH {
                tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                break;
            }
        }
        // The server hangs: the connection stays open, and the kernel acknowledges its segments.
        std::future::pending::<()>().await;
    });
    at
}

async fn upload<B>(at: SocketAddr, timeouts: Timeouts, body: B) -> Result<StatusCode, BoxError>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let mut connector = HttpConnector::new();
    connector.set_send_buffer_size(Some(32 * 1024));
    let client = Client::builder(TokioExecutor::new()).build(connector);
    let client = TimeoutLayer::new(timeouts).layer(client);
    let request = Request::put(format!("http://{at}/")).body(body).unwrap();
    Ok(net::soon(client.oneshot(request)).await?.status())
}

fn whole() -> Full<Bytes> {
    Full::from(vec![0; LENGTH])
}

#[track_caller]
fn phase(result: Result<StatusCode, BoxError>) -> TimeoutPhase {
    match Rejected::find(&*result.unwrap_err()).map(Rejected::kind) {
        Some(RejectedKind::TimedOut(phase)) => phase,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn timeout_of_the_head_begins_when_a_body_of_one_frame_has_been_sent() {
    let at = takes(usize::MAX, ms(3)).await;
    let start = Instant::now();
    let status = upload(at, Timeouts::new().head(ms(500)).request_stall(ms(500)), whole()).await;
    assert!(start.elapsed() > ms(700), "sent too fast for this test: {:?}", start.elapsed());
    assert_eq!(status.unwrap(), StatusCode::OK);
}

#[tokio::test]
async fn request_stall_ends_a_call_whose_upstream_stops_reading() {
    let at = takes(10, ms(30)).await;
    let start = Instant::now();
    let timeouts = Timeouts::http().request_stall(ms(400));
    assert_eq!(phase(upload(at, timeouts, whole()).await), TimeoutPhase::Taking);
    assert!(start.elapsed() > ms(500) && start.elapsed() < ms(5000), "{:?}", start.elapsed());
}

#[tokio::test]
async fn request_idle_ends_a_call_whose_request_body_stalls() {
    let frame = || Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"frame")));
    let body = StreamBody::new(stream::iter([frame(), frame()]).chain(stream::pending()));
    let at = takes(usize::MAX, ms(0)).await;
    let timeouts = Timeouts::http().request_idle(ms(200)).request_stall(ms(50));
    assert_eq!(phase(upload(at, timeouts, BodyExt::boxed(body)).await), TimeoutPhase::Sending);
}
