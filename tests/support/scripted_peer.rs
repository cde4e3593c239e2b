//! Scripted servers over raw sockets, which end connections and streams in the ways that the tests need.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Barrier,
};

use super::net::listener;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// How a server ends a connection.
#[derive(Clone, Copy, Debug)]
pub enum End {
    Fin,
    Rst,
}

impl End {
    fn close(self, tcp: TcpStream) {
        if let Self::Rst = self {
            tcp.set_zero_linger().unwrap();
        }
        drop(tcp);
    }
}

pub const ENDS: [End; 2] = [End::Fin, End::Rst];

#[derive(Clone)]
pub struct Peer {
    pub addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
    is_broken: Arc<AtomicBool>,
}

impl Peer {
    /// Serves each connection. Connections are numbered from 1.
    async fn serve<F>(serve: impl Fn(usize, TcpStream, Self) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (listener, addr) = listener().await;
        let peer = Self {
            addr,
            connections: Arc::default(),
            ended: Arc::default(),
            is_broken: Arc::default(),
        };
        let this = peer.clone();
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let number = this.connections.fetch_add(1, SeqCst) + 1;
                tokio::spawn(serve(number, tcp, this.clone()));
            }
        });
        peer
    }

    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }

    /// Returns the number of connections that the server ended with a request on them.
    pub fn ended(&self) -> usize {
        self.ended.load(SeqCst)
    }

    fn end(&self, tcp: TcpStream, end: End) {
        self.ended.fetch_add(1, SeqCst);
        end.close(tcp);
    }

    /// Sets whether a server of [`responds_once`] ends each connection at its first request, instead of its second.
    pub fn set_broken(&self, is_broken: bool) {
        self.is_broken.store(is_broken, SeqCst);
    }
}

// ===== HTTP/1.1 =====

/// Reads the head of a request without a body. Returns `false` if the client closed the connection.
async fn read_head(tcp: &mut TcpStream) -> bool {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if !tcp.read_buf(&mut head).await.is_ok_and(|bytes| bytes > 0) {
            return false;
        }
    }
    true
}

/// Responds once, to all of its first `stale` connections at the same time, and ends each of them as its second
/// request arrives. Later connections work.
pub async fn goes_stale(stale: usize, end: End) -> Peer {
    let all = Arc::new(Barrier::new(stale));
    Peer::serve(move |number, mut tcp, peer| {
        let all = all.clone();
        async move {
            let mut requests = 0;
            while read_head(&mut tcp).await {
                requests += 1;
                if number <= stale {
                    if requests == 2 {
                        return peer.end(tcp, end);
                    }
                    all.wait().await;
                }
                tcp.write_all(OK).await.unwrap();
            }
        }
    })
    .await
}

/// Responds to the first request of each connection, and ends it as its second request arrives.
pub async fn responds_once(end: End) -> Peer {
    Peer::serve(move |_, mut tcp, peer| async move {
        let mut requests = 0;
        while read_head(&mut tcp).await {
            requests += 1;
            if requests == 2 || peer.is_broken.load(SeqCst) {
                return peer.end(tcp, end);
            }
            tcp.write_all(OK).await.unwrap();
        }
    })
    .await
}

/// Ends each connection at its first request.
pub async fn ends_all(end: End) -> Peer {
    let peer = responds_once(end).await;
    peer.set_broken(true);
    peer
}

/// Responds to the first request of each connection with the head and a part of the body, and ends the connection.
pub async fn cuts_off_bodies(end: End) -> Peer {
    Peer::serve(move |_, mut tcp, peer| async move {
        if read_head(&mut tcp).await {
            tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut").await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            peer.end(tcp, end);
        }
    })
    .await
}

/// Ends each connection before it reads anything.
pub async fn ends_at_once(end: End) -> Peer {
    Peer::serve(move |_, tcp, peer| async move { peer.end(tcp, end) }).await
}

/// Ends its first connection some time after the request arrives, and never responds on later ones.
pub async fn ends_then_hangs(after: Duration) -> Peer {
    Peer::serve(move |number, mut tcp, peer| async move {
        while read_head(&mut tcp).await {
            if number == 1 {
                tokio::time::sleep(after).await;
                return peer.end(tcp, End::Fin);
            }
        }
    })
    .await
}

// ===== HTTP/2 =====

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

/// `:status: 200`, indexed (RFC 7541 appendix A).
const STATUS_200: u8 = 0x88;

/// A frame (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

pub fn go_away(last: u32, code: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat())
}

pub fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

/// A gRPC response without a message, which is also a plain response without a body.
fn respond(stream: u32) -> Vec<u8> {
    let mut block = vec![STATUS_200];
    for text in ["content-type", "application/grpc", "grpc-status", "0"].chunks(2) {
        // A literal without indexing, with a new name (RFC 7541 §6.2.2).
        block.push(0);
        for text in text {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &block)
}

struct Http2(TcpStream);

impl Http2 {
    async fn accept(mut tcp: TcpStream, max_streams: u32) -> Option<Self> {
        const MAX_CONCURRENT_STREAMS: u16 = 3;
        let mut settings = MAX_CONCURRENT_STREAMS.to_be_bytes().to_vec();
        settings.extend_from_slice(&max_streams.to_be_bytes());
        tcp.write_all(&frame(SETTINGS, 0, 0, &settings)).await.ok()?;
        tcp.read_exact(&mut [0; b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await.ok()?;
        Some(Self(tcp))
    }

    /// The stream of the next request.
    async fn request(&mut self) -> Option<u32> {
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            self.0.read_exact(&mut vec![0; length as usize]).await.ok()?;
            if head[3] == HEADERS {
                return Some(u32::from_be_bytes([head[5], head[6], head[7], head[8]]));
            }
        }
    }

    async fn write(&mut self, frame: Vec<u8>) {
        // The client may have closed the connection.
        let _ = self.0.write_all(&frame).await;
    }

    async fn respond_to_all(mut self) {
        while let Some(stream) = self.request().await {
            self.write(respond(stream)).await;
        }
    }
}

/// The action of an HTTP/2 server on the second request of its first connection.
#[derive(Clone, Copy, Debug)]
pub enum Second {
    GoAway(u32),
    Reset(u32),
    /// Sends the response head and a part of the body before it resets the stream.
    ResetBody(u32),
    Close(End),
}

/// Responds to each request, except to the second one of the first connection.
pub async fn http2(second: Second) -> Peer {
    Peer::serve(move |number, tcp, peer| async move {
        let Some(mut http2) = Http2::accept(tcp, 100).await else { return };
        if number == 1 {
            let Some(first) = http2.request().await else { return };
            http2.write(respond(first)).await;
            let Some(stream) = http2.request().await else { return };
            peer.ended.fetch_add(1, SeqCst);
            match second {
                Second::GoAway(code) => http2.write(go_away(first, code)).await,
                Second::Reset(code) => http2.write(reset(stream, code)).await,
                Second::ResetBody(code) => {
                    http2.write(frame(HEADERS, END_HEADERS, stream, &[STATUS_200])).await;
                    http2.write(frame(DATA, 0, stream, b"cut")).await;
                    http2.write(reset(stream, code)).await;
                }
                Second::Close(end) => return end.close(http2.0),
            }
        }
        http2.respond_to_all().await;
    })
    .await
}

/// Allows one stream at a time. The first connection responds once, leaves the second request without a response, and
/// sends GOAWAY with `PROTOCOL_ERROR` while a third one waits for a stream.
pub async fn http2_goes_away_from_a_waiting_request(after: Duration) -> Peer {
    Peer::serve(move |number, tcp, peer| async move {
        let Some(mut http2) = Http2::accept(tcp, 1).await else { return };
        if number == 1 {
            let Some(first) = http2.request().await else { return };
            http2.write(respond(first)).await;
            let Some(second) = http2.request().await else { return };
            tokio::time::sleep(after).await;
            const PROTOCOL_ERROR: u32 = 1;
            http2.write(go_away(second, PROTOCOL_ERROR)).await;
            return peer.end(http2.0, End::Fin);
        }
        http2.respond_to_all().await;
    })
    .await
}

/// Ends each connection at its first request.
pub async fn http2_ends_all(end: End) -> Peer {
    Peer::serve(move |_, tcp, peer| async move {
        let Some(mut http2) = Http2::accept(tcp, 100).await else { return };
        if http2.request().await.is_some() {
            peer.end(http2.0, end);
        }
    })
    .await
}

/// Resets every stream with `REFUSED_STREAM`, and counts each as ended.
pub async fn http2_refuses_all() -> Peer {
    Peer::serve(move |_, tcp, peer| async move {
        const REFUSED_STREAM: u32 = 7;
        let Some(mut http2) = Http2::accept(tcp, 100).await else { return };
        while let Some(stream) = http2.request().await {
            peer.ended.fetch_add(1, SeqCst);
            http2.write(reset(stream, REFUSED_STREAM)).await;
        }
    })
    .await
}
