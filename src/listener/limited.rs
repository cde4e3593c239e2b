use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};

use super::{accept::AcceptErrors, connection::Connection, rejection, slot::ConnectionSlots};
use crate::{
    error::ConfigError,
    limit::{ConcurrencyLimitHandle, ConcurrencyLimitLayer, OwnedPermit},
    outcome::Rejected,
};

/// A TCP listener with a limit on its connections. See the [module](super).
#[derive(Debug)]
pub struct LimitedListener {
    tcp: TcpListener,
    limit: ConcurrencyLimitHandle,
    slots: ConnectionSlots,
    errors: AcceptErrors,
    /// An accepted connection that waits for a slot. It is a field, so that dropping the future of `accept` does not
    /// close it.
    next: Option<(TcpStream, SocketAddr)>,
    rejections: JoinSet<()>,
    waits: bool,
    head_timeout: Option<Duration>,
}

/// The maximum number of connections that are rejected at the same time.
const MAX_REJECTIONS: usize = 64;
/// The default time limit of the first request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum time for which the listener waits until a reclaimed connection has closed.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(1);

impl LimitedListener {
    /// Binds `addr` and listens for connections, `limit` of which may be open at the same time.
    ///
    /// `backlog` is the number of connections that the kernel queues before they are accepted. The system may cap it.
    ///
    /// # Errors
    ///
    /// Fails if the system cannot bind the address. A limit of zero or above `u32::MAX` is an error of the kind
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) that contains the [`ConfigError`].
    ///
    /// # Panics
    ///
    /// Panics outside of a Tokio runtime with IO enabled. The connections need its timers as well.
    pub fn bind(addr: SocketAddr, backlog: u32, limit: usize) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // On Unix, SO_REUSEADDR lets a restarted server bind the address while old connections are in TIME_WAIT. On
        // Windows the option would let another process bind it too.
        #[cfg(unix)]
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        Self::new(socket.listen(backlog)?, limit).map_err(invalid)
    }

    /// Accepts connections from `tcp`, `limit` of which may be open at the same time.
    ///
    /// # Errors
    ///
    /// Fails if the limit is zero or above `u32::MAX`.
    pub fn new(tcp: TcpListener, limit: usize) -> Result<Self, ConfigError> {
        let limit = ConcurrencyLimitLayer::new(limit)
            // Only the accept loop waits for a permit, with one queue entry and in effect without a time limit.
            .queue(1, Duration::from_secs(u32::MAX.into()))
            .name("connections")
            .checked()?;
        Ok(Self {
            tcp,
            limit: limit.handle(),
            slots: ConnectionSlots::new(),
            errors: AcceptErrors::new(),
            next: None,
            rejections: JoinSet::new(),
            waits: false,
            head_timeout: Some(HEAD_TIMEOUT),
        })
    }

    /// Sets the time limit of the first request head of a connection, from the accept on: 10 s by default.
    ///
    /// It applies under every server, including `axum::serve`. Over TLS it covers the time until the first byte.
    ///
    /// # Errors
    ///
    /// Fails if the time limit is zero.
    pub fn head_timeout(mut self, timeout: Duration) -> Result<Self, ConfigError> {
        self.head_timeout = Some(ConfigError::above_zero("head_timeout", timeout)?);
        Ok(self)
    }

    /// Removes the time limit of the first request head, for protocols in which the server sends first.
    ///
    /// A full listener still reclaims such connections.
    #[must_use]
    pub fn without_head_timeout(mut self) -> Self {
        self.head_timeout = None;
        self
    }

    /// Lets new connections wait while the listener is full, instead of rejecting them.
    ///
    /// The listener accepts one connection beyond the limit, which waits for a slot. Further connections wait in the
    /// backlog.
    #[must_use]
    pub fn wait_when_full(mut self) -> Self {
        self.waits = true;
        self
    }

    /// Returns a handle that reads the number of connections and changes the limit.
    #[must_use]
    pub fn handle(&self) -> ConcurrencyLimitHandle {
        self.limit.clone()
    }

    /// Returns the local address of the listener.
    ///
    /// # Errors
    ///
    /// Fails if the system cannot return the address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Returns the next connection that has a slot. The future can be dropped and the method called again: no accepted
    /// connection is lost.
    ///
    /// If the listener is full, it closes the connection that has been idle for the longest time, if that is one second
    /// or more. If there is none, the new connection is rejected, or waits if [`wait_when_full`](Self::wait_when_full)
    /// is set.
    ///
    /// The method does not return errors. It skips errors of one connection. After any other error, such as no free
    /// file descriptors, it pauses for one second and emits a WARN event, at most once in 10 s.
    pub async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            while self.next.is_none() {
                self.errors.pause().await;
                self.next = self.errors.check(self.tcp.accept().await);
            }
            let permit = self.acquire().await;
            let Some((tcp, addr)) = self.next.take() else { continue };
            match permit {
                Ok(permit) => {
                    let slot = self.slots.occupy();
                    return (Connection::new(tcp, permit, slot, self.head_timeout), addr);
                }
                Err(rejected) => {
                    while self.rejections.try_join_next().is_some() {}
                    if self.rejections.len() < MAX_REJECTIONS {
                        self.rejections.spawn(rejection::reject(tcp, rejected));
                    }
                }
            }
        }
    }

    /// Acquires the permit of a new connection. If the listener is full, it reclaims a slot first.
    async fn acquire(&mut self) -> Result<OwnedPermit, Rejected> {
        if self.limit.in_flight() >= self.limit.limit() && self.slots.reclaim() {
            // The task of the reclaimed connection closes it, and so releases its permit.
            if let Ok(permit) = timeout(RECLAIM_TIMEOUT, self.limit.acquire()).await {
                return permit;
            }
        }
        if self.waits { self.limit.acquire().await } else { self.limit.try_acquire() }
    }
}

#[cfg(feature = "axum")]
#[cfg_attr(docsrs, doc(cfg(feature = "axum")))]
impl axum::serve::Listener for LimitedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        Self::accept(self).await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Self::local_addr(self)
    }
}
