//! Responses that their client does not read, or reads slowly.

use super::*;
use crate::support::net::until;

const WRITE: Duration = ms(500);

fn limits(server: Server) -> Server {
    server.write_timeout(WRITE)
}

#[tokio::test]
async fn http1_connection_whose_client_does_not_read_is_reset_and_its_permit_released() {
    let served = serve(limits).await;
    let mut tcp = connect(served.addr).await;
    tcp.write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until(|| served.calls.in_flight() == 1).await;
    let began = Instant::now();
    until(|| served.calls.in_flight() == 0).await;
    assert!(
        began.elapsed() + ms(50) >= WRITE && began.elapsed() < 5 * WRITE,
        "{:?}",
        began.elapsed()
    );
    // The kernel does not keep the rest for the client.
    let mut read = Vec::new();
    assert!(soon(tcp.read_to_end(&mut read)).await.is_err(), "a reset, not an end");
}

#[tokio::test]
async fn without_a_write_timeout_a_client_may_stop_reading() {
    let served = serve(Server::without_write_timeout).await;
    let mut tcp = connect(served.addr).await;
    tcp.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    sleep(3 * WRITE).await;
    let mut read = Vec::new();
    soon(tcp.read_to_end(&mut read)).await.unwrap();
    assert!(read.len() > 4 * 1024 * 1024);
}

#[tokio::test]
async fn http2_stream_whose_client_does_not_read_is_reset_and_other_streams_continue() {
    let served = serve(limits).await;
    // The window of the connection is larger than that of a stream.
    let mut client = h2::client::Builder::new();
    client.initial_connection_window_size(1024 * 1024);
    let handshake = client.handshake::<_, Bytes>(connect(served.addr).await);
    let (mut send, connection) = soon(handshake).await.unwrap();
    tokio::spawn(connection);
    let (unread, _) = send.send_request(net::get(served.addr, "/endless").map(drop), true).unwrap();
    let mut unread = soon(unread).await.unwrap().into_body();
    let (silent, _) = send.send_request(net::get(served.addr, "/events").map(drop), true).unwrap();
    let mut silent = soon(silent).await.unwrap().into_body();
    assert_eq!(soon(silent.data()).await.unwrap().unwrap(), "event");
    assert_eq!(served.calls.in_flight(), 2);
    let began = Instant::now();
    while served.calls.in_flight() == 2 {
        // The data of other streams is released, so that the window of the connection stays open.
        let (response, _) = send.send_request(net::get(served.addr, "/").map(drop), true).unwrap();
        let mut body = soon(response).await.unwrap().into_body();
        let data = soon(body.data()).await.unwrap().unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        assert!(began.elapsed() < 5 * WRITE, "the unread stream holds its permit");
        send = soon(send.ready()).await.unwrap();
        sleep(ms(10)).await;
    }
    assert!(began.elapsed() + ms(50) >= WRITE);
    let error = soon(async {
        loop {
            match unread.data().await {
                Some(Ok(_)) => {}
                other => break other.expect("an error").unwrap_err(),
            }
        }
    });
    assert!(error.await.is_reset());
    // The handler of the other stream is silent, and its client reads.
    sleep(2 * WRITE).await;
    assert_eq!(served.calls.in_flight(), 1);
    let (response, _) = send.send_request(net::get(served.addr, "/").map(drop), true).unwrap();
    assert_eq!(soon(response).await.unwrap().status(), 200);
}

#[tokio::test]
async fn slow_but_steady_http1_reader_is_not_ended() {
    let served = serve(limits).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    let mut tcp = soon(socket.connect(served.addr)).await.unwrap();
    tcp.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let (began, mut read, mut buffer) = (Instant::now(), 0, vec![0; 192 * 1024]);
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match soon(tcp.read(&mut buffer[filled..])).await.unwrap() {
                0 => break,
                n => filled += n,
            }
        }
        read += filled;
        if filled < buffer.len() {
            break;
        }
        sleep(WRITE / 4).await;
    }
    assert!(read > 4 * 1024 * 1024, "{read}");
    assert!(began.elapsed() > 3 * WRITE);
    until(|| served.calls.in_flight() == 0).await;
}

#[tokio::test]
async fn slow_but_steady_http2_reader_is_not_ended() {
    let served = serve(limits).await;
    let (mut send, connection) =
        soon(h2::client::handshake(connect(served.addr).await)).await.unwrap();
    tokio::spawn(connection);
    let (response, _) = send.send_request(net::get(served.addr, "/large").map(drop), true).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    let (began, mut read, mut owed) = (Instant::now(), 0, 0);
    while let Some(data) = soon(body.data()).await {
        let data = data.unwrap();
        read += data.len();
        owed += data.len();
        // Below the window of 64 KiB, so that the server always waits for the release.
        if owed >= 48 * 1024 {
            sleep(WRITE / 16).await;
            body.flow_control().release_capacity(owed).unwrap();
            owed = 0;
        }
    }
    assert_eq!(read, 4 * 1024 * 1024);
    assert!(began.elapsed() > 3 * WRITE, "{:?}", began.elapsed());
}

/// A handler may drive an upgraded connection on a thread without a runtime.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upgraded_connection_whose_client_does_not_read_ends_outside_of_a_runtime_too() {
    use http::{Request, Response, StatusCode, header};
    use hyper::body::Incoming;
    use hyper_util::rt::TokioIo;

    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let (ended, has_ended) = tokio::sync::oneshot::channel();
    let ended = std::sync::Arc::new(std::sync::Mutex::new(Some(ended)));
    let service = tower::service_fn(move |request: Request<Incoming>| {
        let ended = ended.lock().unwrap().take().unwrap();
        std::thread::spawn(move || {
            let result = block_on(async {
                let mut io = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
                loop {
                    if let Err(error) = io.write_all(&[0; 64 * 1024]).await {
                        break error.kind();
                    }
                }
            });
            ended.send(result).unwrap();
        });
        async {
            let mut response = Response::new(String::new());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert(header::CONNECTION, "upgrade".parse().unwrap());
            response.headers_mut().insert(header::UPGRADE, "raw".parse().unwrap());
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let (listener, addr) = net::listener().await;
    tokio::spawn(limits(lifecycle.server()).serve(listener, service));
    let mut tcp = connect(addr).await;
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(soon(has_ended).await.unwrap(), std::io::ErrorKind::TimedOut);
}

/// Runs a future on this thread, which has no runtime.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}
