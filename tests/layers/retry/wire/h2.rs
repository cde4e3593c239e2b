//! HTTP/2: refused streams, resets and `GOAWAY`.

use std::sync::{Arc, Mutex};

use buttress::{Attempts, retry::GiveUpReason};
use bytes::Bytes;
use http::{Method, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tower::Layer;

use super::{AttemptContext, client, connector, layer, request};
use crate::layers::retry::fixtures::*;

/// How an h2 server ends its first stream. It responds to all others with 200.
#[derive(Clone, Copy, Debug)]
enum First {
    Reset(h2::Reason),
    /// The server resets the stream after it has read the whole request.
    ResetLate(h2::Reason),
}

async fn h2_server(io: DuplexStream, seen: AttemptContext, first: First) {
    let mut connection = h2::server::handshake(io).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        seen.request();
        let number = seen.requests();
        tokio::spawn(async move {
            let reset = |reason, respond: &mut h2::server::SendResponse<Bytes>| {
                respond.send_reset(reason);
            };
            match first {
                First::Reset(reason) if number == 1 => return reset(reason, &mut respond),
                _ => {}
            }
            let mut body = request.into_body();
            let mut length = 0;
            while let Some(Ok(data)) = body.data().await {
                length += data.len();
                let _ = body.flow_control().release_capacity(data.len());
            }
            match first {
                First::ResetLate(reason) if number == 1 => return reset(reason, &mut respond),
                _ => {}
            }
            let head = Response::builder().status(200).body(()).unwrap();
            let mut send = respond.send_response(head, false).unwrap();
            send.send_data(Bytes::from(length.to_string()), true).unwrap();
        });
    }
}

async fn over_h2(
    method: Method,
    body: &'static str,
    first: First,
) -> (Attempts, Option<Bytes>, f64) {
    let (seen, budget) = (AttemptContext::default(), purse(9));
    let connector = connector(&seen, move |_, io, seen| Some(h2_server(io, seen, first)));
    let service = layer(&budget).layer(client().http2_only(true).build(connector));
    let result = send(&service, request(method, body)).await;
    let told = told(&result);
    assert_eq!(seen.requests(), told.made);
    let body = match result {
        Ok(response) => Some(read(response.into_body()).await.0),
        Err(_) => None,
    };
    (told, body, budget.balance())
}

#[tokio::test(start_paused = true)]
async fn a_refused_stream_is_retried_for_any_method_without_withdrawal() {
    let refused = h2::Reason::REFUSED_STREAM;
    for method in [Method::POST, Method::GET, Method::PATCH] {
        for first in [First::Reset(refused), First::ResetLate(refused)] {
            for (body, length) in [("", "0"), ("the body", "8")] {
                let (told, answer, balance) = over_h2(method.clone(), body, first).await;
                let case = format!("{method} {body:?} {first:?}");
                assert_eq!((told.made, told.stop), (2, GiveUpReason::Responded), "{case}");
                assert_eq!(
                    answer.as_deref(),
                    Some(length.as_bytes()),
                    "{case}: the body is replayed"
                );
                assert_eq!((told.waited, balance), (ms(0), 9.0), "{case}");
            }
        }
    }
}

/// The connection drops the body that it sends when the attempt ends.
#[tokio::test(start_paused = true)]
async fn an_upload_on_a_refused_stream_is_replayed() {
    let (seen, budget) = (AttemptContext::default(), purse(9));
    let refused = First::Reset(h2::Reason::REFUSED_STREAM);
    let connector = connector(&seen, move |_, io, seen| Some(h2_server(io, seen, refused)));
    let service = layer(&budget).layer(client().http2_only(true).build(connector));
    let pause = Piece::Pause(ms(500));
    let body = ScriptBody::new([data("one"), pause.clone(), data("two"), pause, data("three")]);
    let request = Request::post("http://pipe/").body(body.without_hints()).unwrap();
    let result = send(&service, request).await;
    assert_eq!((told(&result).made, told(&result).stop), (2, GiveUpReason::Responded));
    assert_eq!(read(result.unwrap().into_body()).await.0, "11");
    assert_eq!(seen.requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn any_other_reset_is_not_safe_for_post() {
    for reason in [h2::Reason::CANCEL, h2::Reason::INTERNAL_ERROR, h2::Reason::ENHANCE_YOUR_CALM] {
        for first in [First::Reset(reason), First::ResetLate(reason)] {
            let (told, ..) = over_h2(Method::POST, "the body", first).await;
            assert_eq!((told.made, told.stop), (1, GiveUpReason::Unsafe), "{first:?}");
            let (told, ..) = over_h2(Method::GET, "", first).await;
            assert_eq!((told.made, told.stop), (2, GiveUpReason::Responded), "{first:?}");
        }
    }
}

/// The frame `GOAWAY` (RFC 9113 §6.8).
fn go_away(last: u32, reason: u32) -> Vec<u8> {
    let mut frame = vec![0, 0, 8, 7, 0, 0, 0, 0, 0];
    frame.extend(last.to_be_bytes());
    frame.extend(reason.to_be_bytes());
    frame
}

/// A server of raw frames. Reads the preface and the first request, and sends GOAWAY.
async fn goes_away(mut io: DuplexStream, seen: AttemptContext, last: u32, reason: u32) {
    let mut read = Vec::new();
    // An empty SETTINGS frame.
    io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
    // Reads until the first HEADERS frame.
    loop {
        let mut rest = read.get(preface..).unwrap_or_default();
        let mut headers = false;
        while let [a, b, c, kind, _, _, _, _, _, payload @ ..] = rest {
            headers |= *kind == 1;
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            rest = payload.get(length..).unwrap_or_default();
        }
        if headers {
            break;
        }
        if io.read_buf(&mut read).await.unwrap() == 0 {
            return;
        }
    }
    seen.request();
    io.write_all(&go_away(last, reason)).await.unwrap();
    // The client closes the connection. If the stream was accepted, the server closes it.
    if last == 0 {
        while io.read_buf(&mut read).await.is_ok_and(|n| n > 0) {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_above_the_last_id_of_goaway_is_retried_without_withdrawal() {
    // The last stream, the error code (it does not matter), and whether the request was not processed.
    for (last, reason, unseen) in [(0, 0, true), (1, 0, false), (0, 11, true), (1, 2, false)] {
        for method in [Method::POST, Method::GET] {
            let (seen, budget) = (AttemptContext::default(), purse(9));
            let connector = connector(&seen, move |n, io, seen| {
                Some(async move {
                    match n {
                        1 => goes_away(io, seen, last, reason).await,
                        _ => h2_server(io, seen, First::Reset(h2::Reason::CANCEL)).await,
                    }
                })
            });
            let service = layer(&budget).layer(client().http2_only(true).build(connector));
            let result = send(&service, request(method.clone(), "the body")).await;
            let told = told(&result);
            let case = format!("{method}, last {last}, reason {reason}: {result:?}");
            if unseen || method == Method::GET {
                assert_eq!((told.made, told.stop), (2, GiveUpReason::Responded), "{case}");
                assert_eq!(seen.requests(), 2, "{case}");
                assert_eq!(read(result.unwrap().into_body()).await.0, "8");
                // The connection of an accepted stream broke, and is assumed to be reused.
                assert_eq!(budget.balance(), 9.0, "{case}");
            } else {
                assert_eq!((told.made, told.stop), (1, GiveUpReason::Unsafe), "{case}");
                assert_eq!(seen.requests(), 1, "{case}");
            }
        }
    }
}

/// The transparent retries against a server that refuses every stream are bounded.
#[tokio::test(start_paused = true)]
async fn retries_end_if_the_server_refuses_every_stream() {
    let (seen, budget) = (AttemptContext::default(), purse(9));
    let streams = Arc::new(Mutex::new(0));
    let connector = connector(&seen, move |_, io, seen| {
        let streams = streams.clone();
        Some(async move {
            let mut connection = h2::server::handshake(io).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                seen.request();
                *streams.lock().unwrap() += 1;
                respond.send_reset(h2::Reason::REFUSED_STREAM);
            }
        })
    });
    let service = layer(&budget).layer(client().http2_only(true).build(connector));
    let result = send(&service, request(Method::POST, "")).await;
    let told = told(&result);
    assert_eq!(
        (told.made, told.stop),
        (8, GiveUpReason::AttemptsUsedUp),
        "five transparent retries"
    );
    assert_eq!((seen.requests(), budget.balance()), (8, 7.0));
}
