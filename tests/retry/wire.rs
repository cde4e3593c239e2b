//! Errors as hyper and h2 really make them, over pipes in memory.

use std::{
    io::{self, ErrorKind},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use buttress::{Attempts, Backoff, RetryBudget, RetryLayer, retry::Stop};
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo},
};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex,
};
use tower::{Layer, Service, service_fn};

use crate::kit::{Piece, Script, data, ms, purse, read, send, told};

// ===== Pipes =====

#[derive(Debug)]
struct Pipe(DuplexStream);

impl Connection for Pipe {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// How many connections were made, and requests seen.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<(AtomicU32, AtomicU32)>);

impl Seen {
    fn connections(&self) -> u32 {
        self.0.0.load(SeqCst)
    }

    fn requests(&self) -> u32 {
        self.0.1.load(SeqCst)
    }

    fn request(&self) {
        self.0.1.fetch_add(1, SeqCst);
    }
}

/// Every connection is served by `server`, which is told its number; none: it is refused.
fn connector<F>(
    seen: &Seen,
    server: impl Fn(u32, DuplexStream, Seen) -> Option<F> + Clone + Send + Sync + 'static,
) -> impl Service<
    http::Uri,
    Response = TokioIo<Pipe>,
    Error = io::Error,
    Future = std::future::Ready<io::Result<TokioIo<Pipe>>>,
> + Clone
+ Send
+ Sync
+ 'static
where
    F: Future<Output = ()> + Send + 'static,
{
    let seen = seen.clone();
    service_fn(move |_: http::Uri| {
        let n = seen.0.0.fetch_add(1, SeqCst) + 1;
        let (ours, theirs) = duplex(64 * 1024);
        std::future::ready(match server(n, theirs, seen.clone()) {
            Some(serving) => {
                tokio::spawn(serving);
                Ok(TokioIo::new(Pipe(ours)))
            }
            None => Err(ErrorKind::ConnectionRefused.into()),
        })
    })
}

fn client() -> hyper_util::client::legacy::Builder {
    let mut builder = Client::builder(TokioExecutor::new());
    // It would repeat by itself what is ours to repeat.
    builder.retry_canceled_requests(false);
    builder
}

fn layer(budget: &RetryBudget) -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(5)).without_jitter()).budget(budget.clone())
}

fn request(method: Method, body: &'static str) -> Request<Full<Bytes>> {
    Request::builder().method(method).uri("http://pipe/").body(Full::from(body)).unwrap()
}

/// Reads one HTTP/1 request of at most a few hundred bytes; none at the end of the connection.
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

// ===== HTTP/1 =====

/// Answers once, takes a second request and hangs up: what a server does whose idle time is over.
async fn hangs_up_on_the_second(mut io: DuplexStream, seen: Seen) {
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
        let (seen, budget) = (Seen::default(), purse(9));
        let connector = connector(&seen, |_, io, seen| Some(hangs_up_on_the_second(io, seen)));
        let service = layer(&budget).layer(client().build(connector));
        let first = send(&service, request(Method::GET, "")).await.unwrap();
        assert_eq!(read(first.into_body()).await.0, "ok");
        let result = send(&service, request(method.clone(), "body")).await;
        let told = told(&result);
        if repeated {
            assert_eq!(read(result.unwrap().into_body()).await.0, "ok");
            assert_eq!((told.made, told.stop), (2, Stop::Answered), "{method}");
            assert_eq!((seen.connections(), seen.requests()), (2, 3), "{method}");
            assert_eq!(budget.balance(), 8.0);
        } else {
            assert_eq!((told.made, told.stop), (1, Stop::Unsafe), "{method}");
            assert_eq!((seen.connections(), seen.requests()), (1, 2), "{method}: sent once");
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
async fn a_refused_connection_is_tried_again_by_any_method() {
    for method in [Method::POST, Method::GET] {
        let (seen, budget) = (Seen::default(), purse(9));
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

/// The connection's task is gone: hyper gives the request back as it is.
#[tokio::test(start_paused = true)]
async fn a_request_that_was_never_sent_is_repeated_uncharged() {
    let budget = RetryBudget::with(0.1, 0, 1);
    let inner =
        service_fn(|request: Request<buttress::retry::ReplayBody<Full<Bytes>>>| async move {
            let (ours, mut theirs) = duplex(1024);
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(ours)).await?;
            if request.extensions().get::<buttress::retry::Attempt>().is_none() {
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

/// A discarded answer that is small is read away, and its connection used again; a large one costs it.
#[tokio::test(start_paused = true)]
async fn a_drained_answer_keeps_its_connection() {
    for (kib, connections) in [(0, 1), (40, 1), (256, 3)] {
        let seen = Seen::default();
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

// ===== HTTP/2 =====

/// What an h2 server does with its first stream, all others being answered with 200.
#[derive(Clone, Copy, Debug)]
enum First {
    Reset(h2::Reason),
    /// It has read the whole request by then.
    ResetLate(h2::Reason),
}

async fn h2_server(io: DuplexStream, seen: Seen, first: First) {
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
    let (seen, budget) = (Seen::default(), purse(9));
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
async fn a_refused_stream_is_repeated_by_any_method_uncharged() {
    let refused = h2::Reason::REFUSED_STREAM;
    for method in [Method::POST, Method::GET, Method::PATCH] {
        for first in [First::Reset(refused), First::ResetLate(refused)] {
            for (body, length) in [("", "0"), ("the body", "8")] {
                let (told, answer, balance) = over_h2(method.clone(), body, first).await;
                let case = format!("{method} {body:?} {first:?}");
                assert_eq!((told.made, told.stop), (2, Stop::Answered), "{case}");
                assert_eq!(answer.as_deref(), Some(length.as_bytes()), "{case}: the body again");
                assert_eq!((told.waited, balance), (ms(0), 9.0), "{case}");
            }
        }
    }
}

/// The connection lets go of a body that it was sending when the attempt is over.
#[tokio::test(start_paused = true)]
async fn a_refused_upload_is_begun_anew() {
    let (seen, budget) = (Seen::default(), purse(9));
    let refused = First::Reset(h2::Reason::REFUSED_STREAM);
    let connector = connector(&seen, move |_, io, seen| Some(h2_server(io, seen, refused)));
    let service = layer(&budget).layer(client().http2_only(true).build(connector));
    let pause = Piece::Pause(ms(500));
    let body = Script::new([data("one"), pause.clone(), data("two"), pause, data("three")]);
    let request = Request::post("http://pipe/").body(body.untold()).unwrap();
    let result = send(&service, request).await;
    assert_eq!((told(&result).made, told(&result).stop), (2, Stop::Answered));
    assert_eq!(read(result.unwrap().into_body()).await.0, "11");
    assert_eq!(seen.requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_upload_whose_connection_breaks_is_begun_anew() {
    for method in [Method::PUT, Method::POST] {
        let (seen, budget) = (Seen::default(), purse(9));
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
        let body = Script::new([data("one"), Piece::Pause(ms(500)), data("two")]).untold();
        let request = Request::builder().method(method.clone()).uri("http://pipe/");
        let result = send(&service, request.body(body).unwrap()).await;
        let expected = if method == Method::PUT { (2, Stop::Answered) } else { (1, Stop::Unsafe) };
        assert_eq!((told(&result).made, told(&result).stop), expected, "{result:?}");
        assert_eq!(seen.requests(), expected.0);
    }
}

#[tokio::test(start_paused = true)]
async fn any_other_reset_is_not_safe_for_post() {
    for reason in [h2::Reason::CANCEL, h2::Reason::INTERNAL_ERROR, h2::Reason::ENHANCE_YOUR_CALM] {
        for first in [First::Reset(reason), First::ResetLate(reason)] {
            let (told, ..) = over_h2(Method::POST, "the body", first).await;
            assert_eq!((told.made, told.stop), (1, Stop::Unsafe), "{first:?}");
            let (told, ..) = over_h2(Method::GET, "", first).await;
            assert_eq!((told.made, told.stop), (2, Stop::Answered), "{first:?}");
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

/// A server of raw frames: takes the preface and the first request, and goes away.
async fn goes_away(mut io: DuplexStream, seen: Seen, last: u32, reason: u32) {
    let mut read = Vec::new();
    // SETTINGS, empty.
    io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
    // Until the first HEADERS.
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
    // Until the client hangs up; or, with the stream accepted, by hanging up.
    if last == 0 {
        while io.read_buf(&mut read).await.is_ok_and(|n| n > 0) {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_above_goaways_last_is_repeated_uncharged() {
    // Last stream, reason, whether it was not looked at.
    for (last, reason, unseen) in [(0, 0, true), (1, 0, false), (0, 11, false), (1, 2, false)] {
        for method in [Method::POST, Method::GET] {
            let (seen, budget) = (Seen::default(), purse(9));
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
                assert_eq!((told.made, told.stop), (2, Stop::Answered), "{case}");
                assert_eq!(seen.requests(), 2, "{case}");
                assert_eq!(read(result.unwrap().into_body()).await.0, "8");
                assert_eq!(budget.balance(), if unseen { 9.0 } else { 8.0 }, "{case}");
            } else {
                assert_eq!((told.made, told.stop), (1, Stop::Unsafe), "{case}");
                assert_eq!(seen.requests(), 1, "{case}");
            }
        }
    }
}

/// A server that refuses every stream is not asked for ever.
#[tokio::test(start_paused = true)]
async fn a_server_that_refuses_every_stream_is_left_alone_in_the_end() {
    let (seen, budget) = (Seen::default(), purse(9));
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
    assert_eq!((told.made, told.stop), (5, Stop::AttemptsUsedUp), "two for nothing");
    assert_eq!((seen.requests(), budget.balance()), (5, 7.0));
}
