use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

#[cfg(feature = "rustls")]
use std::sync::Arc;
#[cfg(feature = "rustls")]
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};

/// The TLS settings of a server. Without an acceptor, connections are plain TCP.
#[derive(Clone, Default)]
pub(super) struct Tls {
    #[cfg(feature = "rustls")]
    acceptor: Option<TlsAcceptor>,
}

impl Tls {
    #[cfg(feature = "rustls")]
    pub(super) fn new(mut config: Arc<ServerConfig>) -> Self {
        if config.alpn_protocols.is_empty() {
            Arc::make_mut(&mut config).alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
        }
        Self { acceptor: Some(TlsAcceptor::from(config)) }
    }

    /// Performs the TLS handshake, if TLS is configured.
    pub(super) async fn accept<Io>(&self, io: Io) -> io::Result<MaybeTls<Io>>
    where
        Io: AsyncRead + AsyncWrite + Unpin,
    {
        #[cfg(feature = "rustls")]
        if let Some(acceptor) = &self.acceptor {
            return Ok(MaybeTls::Tls { io: Box::new(acceptor.accept(io).await?) });
        }
        Ok(MaybeTls::Plain { io })
    }
}

/// A connection with or without TLS.
pub(super) enum MaybeTls<Io> {
    Plain {
        io: Io,
    },
    #[cfg(feature = "rustls")]
    Tls {
        io: Box<TlsStream<Io>>,
    },
}

impl<Io> MaybeTls<Io> {
    /// Returns the underlying connection.
    pub(super) fn get_ref(&self) -> &Io {
        match self {
            Self::Plain { io } => io,
            #[cfg(feature = "rustls")]
            Self::Tls { io } => io.get_ref().0,
        }
    }
}

/// Calls a method of the plain or the TLS stream.
macro_rules! stream {
    ($self:expr, $io:ident => $call:expr) => {
        match $self.get_mut() {
            MaybeTls::Plain { io } => {
                let $io = Pin::new(io);
                $call
            }
            #[cfg(feature = "rustls")]
            MaybeTls::Tls { io } => {
                let $io = Pin::new(&mut **io);
                $call
            }
        }
    };
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncRead for MaybeTls<Io> {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        stream!(self, io => io.poll_read(cx, buf))
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for MaybeTls<Io> {
    #[inline]
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        stream!(self, io => io.poll_write(cx, buf))
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        stream!(self, io => io.poll_write_vectored(cx, bufs))
    }

    #[inline]
    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain { io } => io.is_write_vectored(),
            #[cfg(feature = "rustls")]
            Self::Tls { io } => io.is_write_vectored(),
        }
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        stream!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        stream!(self, io => io.poll_shutdown(cx))
    }
}
