use std::{future::Future, io, net::SocketAddr};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};

use crate::listener::ConnectionSlot;

/// A source of connections for [`Lifecycle::serve`](super::handle::Lifecycle::serve).
///
/// Implemented for tokio's `TcpListener` and `UnixListener`, and for the capped
/// [`LimitedListener`](crate::listener::LimitedListener). Other implementations need `accept` only:
///
/// ```
/// use std::{io, net::SocketAddr};
/// use buttress::lifecycle::Listener;
/// use tokio::net::{TcpListener, TcpStream};
///
/// /// Accepts connections from this machine only.
/// struct Local(TcpListener);
///
/// impl Listener for Local {
///     type Io = TcpStream;
///     type Addr = SocketAddr;
///
///     async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
///         loop {
///             let (tcp, peer) = self.0.accept().await?;
///             if peer.ip().is_loopback() {
///                 return Ok((tcp, peer));
///             }
///         }
///     }
///
///     fn tcp(io: &TcpStream) -> Option<&TcpStream> {
///         Some(io)
///     }
/// }
/// ```
pub trait Listener: Send {
    /// A connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// The address of a peer, which `serve_each` passes on.
    type Addr: Send;

    /// Accepts the next connection. Must be cancel safe: the server drops the future and calls the method again, and no
    /// connection may be lost in between.
    ///
    /// # Errors
    ///
    /// After `ConnectionRefused`, `ConnectionAborted` and `ConnectionReset` the server calls the method again at once.
    /// After any other error it waits one second, and reports the error in a WARN event, at most once in 10 s.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Io, Self::Addr)>> + Send;

    /// Returns the TCP socket of a connection, or `None` if the connection has none. `None` by default.
    ///
    /// The server sets the options of this socket, and resets it when the peer has stopped reading.
    fn tcp(io: &Self::Io) -> Option<&TcpStream> {
        let _ = io;
        None
    }

    /// Returns the slot that a connection occupies in a capped listener. `None` by default.
    fn slot(io: &Self::Io) -> Option<&ConnectionSlot> {
        let _ = io;
        None
    }
}

impl Listener for TcpListener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }

    fn tcp(io: &TcpStream) -> Option<&TcpStream> {
        Some(io)
    }
}

#[cfg(unix)]
impl Listener for tokio::net::UnixListener {
    type Io = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> io::Result<(Self::Io, Self::Addr)> {
        Self::accept(self).await
    }
}

#[cfg(feature = "listener")]
impl Listener for crate::listener::LimitedListener {
    type Io = crate::listener::Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> io::Result<(Self::Io, SocketAddr)> {
        Ok(Self::accept(self).await)
    }

    fn tcp(io: &Self::Io) -> Option<&TcpStream> {
        Some(io.get_ref())
    }

    fn slot(io: &Self::Io) -> Option<&ConnectionSlot> {
        Some(io.slot())
    }
}
