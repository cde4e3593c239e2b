use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};

use super::{Connection, refusal};
use crate::{
    ConcurrencyLimitLayer, ConfigError, Rejected,
    limit::{ConcurrencyLimitHandle, HeldPlace},
    listener::{AcceptErrors, Slots},
};

/// A TCP listener with a limit on its connections. See the [module](super).
#[derive(Debug)]
pub struct LimitedListener {
    tcp: TcpListener,
    places: ConcurrencyLimitHandle,
    slots: Slots,
    errors: AcceptErrors,
    /// Accepted, and waits for a slot. It is a field, so that a cancelled `accept` does not close it.
    next: Option<(TcpStream, SocketAddr)>,
    refusals: JoinSet<()>,
    waits: bool,
    head_timeout: Option<Duration>,
}

/// Maximum number of connections that are rejected at the same time.
const MOST_REFUSALS: usize = 64;
/// Default time limit of the first request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time that a reclaimed connection may take to close.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(1);

impl LimitedListener {
    /// Listens at `addr` with room for `backlog` connections that are yet to be accepted (the system may have
    /// a cap of its own), and accepts up to `limit` at once.
    ///
    /// # Errors
    ///
    /// As the system says; a limit that is none as [`InvalidInput`](io::ErrorKind::InvalidInput), with the
    /// [`ConfigError`] in it.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime with IO. Connections need its timers as well.
    pub fn bind(addr: SocketAddr, backlog: u32, limit: usize) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A restart must not wait for old connections to be forgotten. Elsewhere it means something else.
        #[cfg(unix)]
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        Self::new(socket.listen(backlog)?, limit).map_err(invalid)
    }

    /// Accepts up to `limit` connections at once from `tcp`.
    ///
    /// # Errors
    ///
    /// A limit of zero, or of more than `u32::MAX`.
    pub fn new(tcp: TcpListener, limit: usize) -> Result<Self, ConfigError> {
        let limit = ConcurrencyLimitLayer::new(limit)
            // The listener alone waits, and it has all the time there is.
            .queue(1, Duration::from_secs(u32::MAX.into()))
            .name("connections")
            .checked()?;
        let places = limit.handle();
        Ok(Self {
            tcp,
            places,
            slots: Slots::new(),
            errors: AcceptErrors::new(),
            next: None,
            refusals: JoinSet::new(),
            waits: false,
            head_timeout: Some(HEAD_TIMEOUT),
        })
    }

    /// Sets the time limit of the first request head of a connection, from the accept on: 10 s by default. Over TLS the
    /// first byte ends it. It holds under every server, `axum::serve` included.
    ///
    /// # Errors
    ///
    /// A limit of zero.
    pub fn head_timeout(mut self, timeout: Duration) -> Result<Self, ConfigError> {
        self.head_timeout = Some(ConfigError::above_zero("head_timeout", timeout)?);
        Ok(self)
    }

    /// Lets connections wait for their first head without a time limit: for protocols in which the server speaks first.
    /// A full listener still closes such a connection for another.
    #[must_use]
    pub fn without_head_timeout(mut self) -> Self {
        self.head_timeout = None;
        self
    }

    /// Accepts one connection beyond the limit, which waits for a slot, and leaves the others in the backlog, instead
    /// of rejecting them.
    #[must_use]
    pub fn wait_when_full(mut self) -> Self {
        self.waits = true;
        self
    }

    /// Looks at the connections, and resizes the limit.
    #[must_use]
    pub fn handle(&self) -> ConcurrencyLimitHandle {
        self.places.clone()
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// As the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Returns the next connection that has a slot. The future can be dropped and the method called again: no accepted
    /// connection is lost.
    ///
    /// If the listener is full, it closes the longest idle connection that has been idle for one second. Otherwise
    /// the new connection is rejected, or waits if [`wait_when_full`](Self::wait_when_full) is set.
    ///
    /// Errors are not returned. Those of one connection are skipped. After others, such as no free file descriptors,
    /// the listener waits for a second and emits a WARN event, at most once in 10 s.
    pub async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            if self.next.is_none() {
                self.next = Some(self.next().await);
            }
            let place = self.place().await;
            let Some((tcp, addr)) = self.next.take() else { continue };
            match place {
                Ok(place) => {
                    let slot = self.slots.occupy();
                    return (Connection::new(tcp, place, slot, self.head_timeout), addr);
                }
                Err(refused) => {
                    while self.refusals.try_join_next().is_some() {}
                    if self.refusals.len() < MOST_REFUSALS {
                        self.refusals.spawn(refusal::tell(tcp, refused));
                    }
                }
            }
        }
    }

    async fn place(&mut self) -> Result<HeldPlace, Rejected> {
        if self.places.in_flight() >= self.places.0.limit() && self.slots.reclaim() {
            // Its task closes the reclaimed connection.
            if let Ok(place) = timeout(RECLAIM_TIMEOUT, self.places.acquire()).await {
                return place;
            }
        }
        if self.waits { self.places.acquire().await } else { self.places.try_acquire() }
    }

    async fn next(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            self.errors.pause().await;
            match self.tcp.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => self.errors.report(&error),
            }
        }
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
