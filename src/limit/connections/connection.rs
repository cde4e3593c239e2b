use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::limit::HeldPlace;

pin_project! {
    /// A connection that holds its place until it is dropped.
    #[derive(Debug)]
    pub struct Connection<Io = TcpStream> {
        #[pin]
        io: Io,
        place: HeldPlace,
    }
}

impl<Io> Connection<Io> {
    pub(super) fn new(io: Io, place: HeldPlace) -> Self {
        Self { io, place }
    }

    /// The connection itself, to set its options.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }

    /// The same place under another stream, such as TLS over this one.
    ///
    /// # Errors
    ///
    /// As `wrap` fails: the place is free again.
    pub async fn map<T, E, F>(self, wrap: impl FnOnce(Io) -> F) -> Result<Connection<T>, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let Self { io, place } = self;
        Ok(Connection { io: wrap(io).await?, place })
    }
}

impl<Io: AsyncRead> AsyncRead for Connection<Io> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.project().io.poll_read(cx, buf)
    }
}

impl<Io: AsyncWrite> AsyncWrite for Connection<Io> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write_vectored(cx, bufs)
    }
}
