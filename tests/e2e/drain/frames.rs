//! HTTP/2 by hand: a client that acknowledges a PING only on request of a test.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::net::soon;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const ACK: u8 = 0x1;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

/// The last stream id of a GOAWAY that only announces the end.
pub const MAX_STREAM: u32 = (1 << 31) - 1;

/// Builds a frame (RFC 9113 §4.1).
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Builds the first half of a header block.
pub fn half_a_header_block() -> Vec<u8> {
    frame(HEADERS, END_STREAM, 1, &[METHOD_GET, SCHEME_HTTP])
}

// Indexed fields of RFC 7541 appendix A.
const METHOD_GET: u8 = 0x82;
const SCHEME_HTTP: u8 = 0x86;
const STATUS_200: u8 = 0x88;
const STATUS_500: u8 = 0x8e;

#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The response head of a stream: whether its status is 200.
    Head(u32, bool),
    Data(u32, usize),
    EndOfStream(u32),
    /// A GOAWAY with NO_ERROR and this last stream.
    GoAway(u32),
    Ping,
    /// The server has closed the connection.
    Closed,
}

/// A connection of HTTP/2.
pub struct Client {
    tcp: TcpStream,
    next_stream: u32,
    ping: Option<Vec<u8>>,
    ended: Option<u32>,
}

impl Client {
    pub async fn connect(addr: SocketAddr) -> Self {
        Self::with_settings(addr, &[]).await
    }

    /// Connects with a stream window of this size.
    pub async fn with_window(addr: SocketAddr, window: u32) -> Self {
        const INITIAL_WINDOW_SIZE: u16 = 4;
        let setting = [&INITIAL_WINDOW_SIZE.to_be_bytes()[..], &window.to_be_bytes()].concat();
        Self::with_settings(addr, &setting).await
    }

    async fn with_settings(addr: SocketAddr, settings: &[u8]) -> Self {
        let mut tcp = TcpStream::connect(addr).await.unwrap();
        tcp.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()).await.unwrap();
        Self { tcp, next_stream: 1, ping: None, ended: None }
    }

    /// Sends a GET. Returns its stream, or `None` if the connection is closed.
    pub async fn get(&mut self, path: &str) -> Option<u32> {
        let stream = self.next_stream;
        self.next_stream += 2;
        let mut block = vec![METHOD_GET, SCHEME_HTTP];
        // `:path` and `:authority`: literals without indexing, with the names 4 and 1.
        for (name, value) in [(0x04, path), (0x01, "x")] {
            block.extend([name, u8::try_from(value.len()).unwrap()]);
            block.extend(value.bytes());
        }
        let headers = frame(HEADERS, END_STREAM | END_HEADERS, stream, &block);
        self.tcp.write_all(&headers).await.is_ok().then_some(stream)
    }

    pub async fn update_window(&mut self, stream: u32, by: u32) {
        let both = [0, stream].map(|stream| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes()));
        // The server closes the connection as soon as it has written the whole response.
        let _ = self.tcp.write_all(&both.concat()).await;
    }

    /// Sends a PING. Returns `false` if the connection is closed.
    pub async fn ping(&mut self) -> bool {
        self.tcp.write_all(&frame(PING, 0, 0, &[0; 8])).await.is_ok()
    }

    /// Acknowledges the PING that has been received.
    pub async fn acknowledge(&mut self) {
        let payload = self.ping.take().expect("a PING");
        self.tcp.write_all(&frame(PING, ACK, 0, &payload)).await.unwrap();
    }

    /// Returns what the server sends next.
    pub async fn event(&mut self) -> Event {
        soon(self.next()).await
    }

    /// Asserts that the server sends nothing for this time.
    pub async fn silent_for(&mut self, time: Duration) {
        // The reads are cancelled on failure only.
        let event = timeout(time, self.next()).await;
        assert!(event.is_err(), "{event:?}");
    }

    async fn next(&mut self) -> Event {
        if let Some(stream) = self.ended.take() {
            return Event::EndOfStream(stream);
        }
        loop {
            let mut head = [0; 9];
            if self.tcp.read_exact(&mut head).await.is_err() {
                return Event::Closed;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            if self.tcp.read_exact(&mut payload).await.is_err() {
                return Event::Closed;
            }
            let (kind, flags) = (head[3], head[4]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            if matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
                self.ended = Some(stream);
            }
            match kind {
                DATA => return Event::Data(stream, payload.len()),
                HEADERS => {
                    assert!(matches!(payload[0], STATUS_200..=STATUS_500 | 0x48), "{payload:?}");
                    return Event::Head(stream, payload[0] == STATUS_200);
                }
                PING if flags & ACK == 0 => {
                    self.ping = Some(payload);
                    return Event::Ping;
                }
                GOAWAY => {
                    assert_eq!(payload[4..8], [0; 4], "an error");
                    let last = [payload[0], payload[1], payload[2], payload[3]];
                    return Event::GoAway(u32::from_be_bytes(last));
                }
                _ => {}
            }
        }
    }

    /// Receives a response with status 200 to its end. Returns the length of its body.
    pub async fn response(&mut self, stream: u32) -> usize {
        assert_eq!(self.event().await, Event::Head(stream, true));
        let mut length = 0;
        loop {
            match self.event().await {
                Event::Data(of, bytes) if of == stream => length += bytes,
                Event::EndOfStream(of) if of == stream => return length,
                other => panic!("{other:?}"),
            }
        }
    }
}
