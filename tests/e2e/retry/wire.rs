//! Errors and responses on the wire: requests that were never sent, refused streams, GOAWAY, early responses.

use super::*;

// ===== Errors =====

#[tokio::test]
async fn unsent_requests_are_retried_for_any_method_and_sent_ones_are_not() {
    for (addr, get, post) in [
        (closed_address().await, 3, 3),
        // The connection is assumed to be stale: five transparent retries, then the ordinary rules.
        (closes_after(b"").await, 8, 1),
        // The caller has received the response head, so the call is not retried.
        (closes_after(HALF).await, 0, 0),
    ] {
        for (method, made) in [(Method::GET, get), (Method::POST, post)] {
            let limit = ConcurrencyLimitLayer::new(1);
            let handle = limit.handle();
            let client = ServiceBuilder::new().layer(retry()).layer(limit).service(client());
            let result = soon(client.oneshot(request(method.clone(), addr, "/", "hello"))).await;
            match result {
                Err(error) => {
                    let attempts = Attempts::find(&*error).unwrap();
                    assert_eq!(attempts.made, made, "{method} {error:?}");
                }
                Ok(response) => {
                    assert_eq!(made, 0);
                    soon(response.into_body().collect()).await.unwrap_err();
                }
            }
            assert_eq!(handle.in_flight(), 0);
        }
    }
}

/// If the connect fails, nothing of the body has been read, regardless of its size.
#[tokio::test]
async fn unsent_body_over_the_cap_is_retried() {
    let addr = closed_address().await;
    for method in [Method::PUT, Method::POST] {
        let client = ServiceBuilder::new().layer(retry()).service(client());
        let body = Full::new(Bytes::from(vec![b'x'; 1024 * KIB]));
        let request = Request::builder().method(method).uri(format!("http://{addr}/"));
        let error = soon(client.oneshot(request.body(body).unwrap())).await.unwrap_err();
        assert_eq!(Attempts::find(&*error).unwrap().made, 3, "{error:?}");
    }
}

/// RFC 9113 §8.7: the server has not processed the request, so it can be retried for any method, with its body.
#[tokio::test]
async fn a_refused_stream_is_retried_for_any_method_at_once() {
    let (listener, addr) = net::listener().await;
    let seen = Arc::new(AtomicUsize::new(0));
    let counter = seen.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let seen = counter.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(tcp).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    if seen.fetch_add(1, Ordering::SeqCst) == 0 {
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                    } else {
                        respond.send_response(http::Response::new(()), true).unwrap();
                    }
                }
            });
        }
    });
    let http2 = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let client =
        ServiceBuilder::new().layer(retry()).layer(CircuitBreakerLayer::http()).service(http2);
    let response = soon(client.oneshot(request(Method::POST, addr, "/", ""))).await.unwrap();
    assert_eq!((response.status(), Attempts::of(&response).made), (StatusCode::OK, 2));
    assert_eq!(seen.load(Ordering::SeqCst), 2);
}

/// RFC 9113 §6.8: GOAWAY states the last stream that the server may have processed. The request has a later stream.
#[tokio::test]
async fn a_stream_above_the_last_id_of_goaway_is_retried_for_any_method() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    const GOAWAY_LAST_0_NO_ERROR: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const HEADERS: u8 = 1;
    let (listener, addr) = net::listener().await;
    tokio::spawn(async move {
        // The first connection receives GOAWAY after its first request.
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(SETTINGS).await.unwrap();
        tcp.read_exact(&mut [0; b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await.unwrap();
        let mut head = [0; 9];
        while head[3] != HEADERS {
            tcp.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            tcp.read_exact(&mut vec![0; length]).await.unwrap();
        }
        tcp.write_all(GOAWAY_LAST_0_NO_ERROR).await.unwrap();
        // The second connection gets responses.
        let (second, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(second).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            respond.send_response(http::Response::new(()), true).unwrap();
        }
        drop(tcp);
    });
    let http2 = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let client = ServiceBuilder::new().layer(retry()).service(http2);
    let response = soon(client.oneshot(request(Method::POST, addr, "/", "hello"))).await.unwrap();
    assert_eq!((response.status(), Attempts::of(&response).made), (StatusCode::OK, 2));
}

// ===== Responses before the end of the request =====

/// The server responds with 503 without reading the body of the request.
#[tokio::test]
async fn a_503_before_the_body_is_read_is_retried() {
    let hits = net::Gauge::default();
    let seen = hits.clone();
    let shed = move || {
        drop(seen.enter());
        async { (StatusCode::SERVICE_UNAVAILABLE, "busy") }
    };
    let addr = net::serve(Router::new().route("/", any(shed))).await;
    for http2 in [false, true] {
        for size in [0, 10, 40 * KIB] {
            let before = hits.total();
            let client =
                hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                    .http2_only(http2)
                    .build_http();
            let client = ServiceBuilder::new().layer(retry()).service(client);
            let body = Full::new(Bytes::from(vec![b'x'; size]));
            let put = Request::put(format!("http://{addr}/")).body(body).unwrap();
            let response = soon(client.oneshot(put)).await.unwrap();
            let attempts = Attempts::of(&response);
            assert_eq!(
                (attempts.made, attempts.stop),
                (3, GiveUpReason::AttemptsUsedUp),
                "{http2} {size}"
            );
            assert_eq!(hits.total() - before, 3);
        }
    }
}
