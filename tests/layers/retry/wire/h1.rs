//! HTTP/1: stale, refused, broken and reused connections.

use buttress::{
    Attempts, RetryBudget,
    retry::{Attempt, GiveUpReason, ReplayBody},
};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tower::{Layer, service_fn};

use super::{AttemptContext, client, connector, layer, request};
use crate::layers::retry::fixtures::*;

/// Reads an HTTP/1 request of a few hundred bytes. Returns `None` at the end of the connection.
async fn read_request(io: &mut DuplexStream) -> Option<String> {
    let mut text = String::new();
    loop {
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .map_or(0, |length| length.parse().unwrap());
            if body.len() >= length {
                return Some(text);
            }
        }
        let mut buffer = [0; 1024];
        match io.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(n) => text.push_str(std::str::from_utf8(&buffer[..n]).unwrap()),
        }
    }
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Responds once, reads a second request and closes the connection, like a server whose idle timeout has passed.
async fn hangs_up_on_the_second(mut io: DuplexStream, seen: AttemptContext) {
    while let Some(_request) = read_request(&mut io).await {
        seen.request();
        if seen.requests() == 2 {
            return;
        }
        io.write_all(OK).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stale_connection_is_not_safe_for_post_and_is_for_get() {
    for (method, repeated) in [(Method::POST, false), (Method::GET, true), (Method::PUT, true)] {
        let (seen, budget) = (AttemptContext::default(), purse(9));
        let connector = connector(&seen, |_, io, seen| Some(hangs_up_on_the_second(io, seen)));
        let service = layer(&budget).layer(client().build(connector));
        let first = send(&service, request(Method::GET, "")).await.unwrap();
        assert_eq!(read(first.into_body()).await.0, "ok");
        let result = send(&service, request(method.clone(), "body")).await;
        let told = told(&result);
        if repeated {
            assert_eq!(read(result.unwrap().into_body()).await.0, "ok");
            assert_eq!((told.made, told.stop), (2, GiveUpReason::Responded), "{method}");
            assert_eq!((seen.connections(), seen.requests()), (2, 3), "{method}");
            assert_eq!(budget.balance(), 9.0);
        } else {
            assert_eq!((told.made, told.stop), (1, GiveUpReason::Unsafe), "{method}");
            assert_eq!(
                (seen.connections(), seen.requests()),
                (1, 2),
                "{method}: the request is sent once"
            );
            let error = result.unwrap_err();
            let mut chain = std::iter::successors(error.source(), |error| error.source());
            assert!(chain.any(|error| {
                error
                    .downcast_ref::<hyper::Error>()
                    .is_some_and(hyper::Error::is_incomplete_message)
            }));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_connection_is_retried_for_any_method() {
    for method in [Method::POST, Method::GET] {
        let (seen, budget) = (AttemptContext::default(), purse(9));
        let connector = connector(&seen, |n, mut io, seen| {
            (n > 2).then_some(async move {
                let text = read_request(&mut io).await.unwrap();
                assert!(text.ends_with("\r\n\r\nthe body"), "{text}");
                seen.request();
                io.write_all(OK).await.unwrap();
            })
        });
        let service = layer(&budget).layer(client().build(connector));
        let response = send(&service, request(method, "the body")).await.unwrap();
        assert_eq!(Attempts::of(&response).made, 3);
        assert_eq!((seen.connections(), seen.requests(), budget.balance()), (3, 1, 7.0));
    }
}

/// The task of the connection has ended. hyper returns the request unchanged.
#[tokio::test(start_paused = true)]
async fn an_unsent_request_is_retried_without_withdrawal() {
    let budget = RetryBudget::with(0.1, 0, 1);
    let inner = service_fn(|request: Request<ReplayBody<Full<Bytes>>>| async move {
        let (ours, mut theirs) = duplex(1024);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(ours)).await?;
        if request.extensions().get::<Attempt>().is_none() {
            drop(connection);
        } else {
            tokio::spawn(connection);
            tokio::spawn(async move {
                assert!(read_request(&mut theirs).await.unwrap().ends_with("the body"));
                theirs.write_all(OK).await.unwrap();
            });
        }
        sender.send_request(request).await
    });
    let start = tokio::time::Instant::now();
    let service = layer(&budget).layer(inner);
    let response = send(&service, request(Method::POST, "the body")).await.unwrap();
    assert_eq!(read(response.into_body()).await.0, "ok");
    assert_eq!((start.elapsed(), budget.balance(), budget.denied()), (ms(0), 0.1, 0));
}

/// A small discarded response is drained, and its connection is reused. A large one closes its connection.
#[tokio::test(start_paused = true)]
async fn the_connection_of_a_drained_response_is_reused() {
    for (kib, connections) in [(0, 1), (40, 1), (256, 3)] {
        let seen = AttemptContext::default();
        let connector = connector(&seen, move |_, mut io, seen| {
            Some(async move {
                while read_request(&mut io).await.is_some() {
                    seen.request();
                    let answer = if seen.requests() < 3 { 503 } else { 200 };
                    let head =
                        format!("HTTP/1.1 {answer} x\r\ncontent-length: {}\r\n\r\n", kib * 1024);
                    let body = vec![7; kib * 1024];
                    let head = io.write_all(head.as_bytes()).await;
                    if head.and(io.write_all(&body).await).is_err() {
                        return;
                    }
                }
            })
        });
        let service = layer(&purse(9)).layer(client().build(connector));
        let response = send(&service, request(Method::GET, "")).await.unwrap();
        assert_eq!((response.status().as_u16(), Attempts::of(&response).made), (200, 3));
        assert_eq!(seen.connections(), connections, "{kib} KiB");
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_whose_connection_breaks_is_replayed() {
    for method in [Method::PUT, Method::POST] {
        let (seen, budget) = (AttemptContext::default(), purse(9));
        let connector = connector(&seen, move |n, mut io, seen| {
            Some(async move {
                seen.request();
                let mut text = Vec::new();
                while !text.ends_with(if n == 1 { b"one\r\n" } else { b"\r\n0\r\n\r\n" }) {
                    assert!(io.read_buf(&mut text).await.unwrap() > 0);
                }
                if n > 1 {
                    io.write_all(OK).await.unwrap();
                }
            })
        });
        let service = layer(&budget).layer(client().build(connector));
        let body =
            ScriptBody::new([data("one"), Piece::Pause(ms(500)), data("two")]).without_hints();
        let request = Request::builder().method(method.clone()).uri("http://pipe/");
        let result = send(&service, request.body(body).unwrap()).await;
        let expected = if method == Method::PUT {
            (2, GiveUpReason::Responded)
        } else {
            (1, GiveUpReason::Unsafe)
        };
        assert_eq!((told(&result).made, told(&result).stop), expected, "{result:?}");
        assert_eq!(seen.requests(), expected.0);
    }
}
