//! Connections in memory. While a test waits for a socket, the paused clock would advance.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tokio::io::DuplexStream;

use super::net::{Gauge, Inside};

/// The client's end of a connection.
#[derive(Debug)]
pub struct Pipe {
    io: TokioIo<DuplexStream>,
    negotiated_http2: bool,
    counted: Vec<Inside>,
}

impl Pipe {
    pub fn new(io: DuplexStream) -> Self {
        Self { io: TokioIo::new(io), negotiated_http2: false, counted: Vec::new() }
    }

    /// Sets whether TLS has negotiated HTTP/2.
    pub fn negotiated_http2(mut self, negotiated: bool) -> Self {
        self.negotiated_http2 = negotiated;
        self
    }

    /// Counts the connection in this gauge until it is dropped.
    pub fn counted_by(mut self, gauge: &Gauge) -> Self {
        self.counted.push(gauge.enter());
        self
    }
}

impl Connection for Pipe {
    fn connected(&self) -> Connected {
        let connected = Connected::new();
        if self.negotiated_http2 { connected.negotiated_h2() } else { connected }
    }
}

impl Read for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
