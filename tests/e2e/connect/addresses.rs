//! Hosts with several addresses, some of which do not respond, and lookups that never end: over real sockets.

use std::{
    net::{
        IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener, TcpStream as StdStream,
        UdpSocket,
    },
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use axum::{Router, routing::get};
use buttress::{
    Outcome,
    connect::{Client, ConnectLayer, TcpConnector},
    outcome::Reason,
};
use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::{
    client::legacy::{
        self,
        connect::{HttpConnector, dns::Name},
    },
    rt::TokioExecutor,
};
use socket2::{Domain, Socket, Type};
use tokio::time::{Instant, sleep};
use tower::{Layer, service_fn};

use crate::support::{ms, net::soon};

const SECOND: Duration = Duration::from_secs(1);

fn v4(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, last).into()
}

/// A listener whose backlog is full: Linux drops each further SYN.
struct BlackHole {
    _listener: Socket,
    _queued: Vec<Socket>,
}

impl BlackHole {
    #[expect(
        clippy::disallowed_methods,
        reason = "the kernel completes the queued handshakes meanwhile"
    )]
    /// `None` if another socket has this port.
    fn at(address: SocketAddr) -> Option<Self> {
        let listener = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        listener.set_reuse_address(true).unwrap();
        listener.bind(&address.into()).ok()?;
        listener.listen(0).unwrap();
        let mut queued = Vec::new();
        for _ in 0..4 {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&address.into());
            queued.push(socket);
        }
        thread::sleep(ms(50));
        let blocked = StdStream::connect_timeout(&address, ms(100));
        assert!(blocked.is_err(), "the backlog is not full");
        Some(Self { _listener: listener, _queued: queued })
    }
}

/// Serves at the last address. SYNs to the addresses before it are dropped. Returns the port.
async fn serve_at_last(addresses: &[IpAddr]) -> (u16, Vec<BlackHole>) {
    let (last, before) = addresses.split_last().unwrap();
    let bind = || {
        let listener = StdListener::bind((*last, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let black_holes = before.iter().map(|ip| BlackHole::at((*ip, port).into()));
        Some((port, black_holes.collect::<Option<Vec<_>>>()?, listener))
    };
    let (port, black_holes, listener) = (0..20).find_map(|_| bind()).expect("a port is free");
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let app = Router::new().route("/", get(|| async { "ok" }));
    tokio::spawn(async move { axum::serve(listener, app).await });
    (port, black_holes)
}

fn get_from(host: &str, port: u16) -> Request<Empty<Bytes>> {
    Request::get(format!("http://{host}:{port}/")).body(Empty::new()).unwrap()
}

/// A client whose resolver returns these addresses for every name.
macro_rules! client_of {
    ($layer:expr, $addresses:expr) => {{
        let addresses = $addresses.to_vec();
        let resolver = service_fn(move |_: Name| {
            let found: Vec<_> = addresses.iter().map(|ip| SocketAddr::from((*ip, 0))).collect();
            async move { Ok::<_, std::io::Error>(found.into_iter()) }
        });
        let builder = Client::builder($layer);
        let connector: TcpConnector<_> = builder.tcp_connector(resolver);
        builder.build(connector)
    }};
}

#[tokio::test]
async fn address_that_drops_syns_takes_only_its_part_of_the_connect_timeout() {
    for before in [1, 2] {
        let addresses: Vec<_> = (1..=before + 1).map(v4).collect();
        let (port, _black_holes) = serve_at_last(&addresses).await;
        let layer = ConnectLayer::new().connect_timeout(SECOND);
        let handle = layer.handle();
        let client = client_of!(layer, addresses);
        let began = Instant::now();
        let response = soon(client.request(get_from("search", port))).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
        assert_eq!((handle.snapshot().timed_out, handle.snapshot().failed), (0, 0));
    }
}

#[tokio::test]
async fn addresses_that_all_drop_syns_time_out_once_in_total() {
    let addresses = [v4(1), v4(2), v4(3)];
    let (port, mut black_holes) = serve_at_last(&addresses[..2]).await;
    black_holes.push(BlackHole::at((addresses[2], port).into()).unwrap());
    let layer = ConnectLayer::new().connect_timeout(ms(300));
    let handle = layer.handle();
    let client = client_of!(layer, [addresses[0], addresses[2]]);
    let began = Instant::now();
    let error = soon(client.request(get_from("search", port))).await.unwrap_err();
    assert!(began.elapsed() >= ms(300) && began.elapsed() < ms(600), "{:?}", began.elapsed());
    assert_eq!(Outcome::of_error(&*error).reason(), Reason::ConnectTimeout);
    assert_eq!((handle.snapshot().timed_out, handle.snapshot().failed), (1, 0));
}

#[tokio::test]
async fn other_address_family_is_tried_at_once_also_with_a_short_connect_timeout() {
    if StdListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        println!("skipped: no IPv6");
        return;
    }
    let addresses = [Ipv6Addr::LOCALHOST.into(), v4(1)];
    for max in [ms(200), SECOND * 5] {
        let (port, _black_holes) = serve_at_last(&addresses).await;
        let client = client_of!(ConnectLayer::new().connect_timeout(max), addresses);
        let began = Instant::now();
        let response = soon(client.request(get_from("search", port))).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(began.elapsed() < ms(600), "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn change_of_the_connect_timeout_applies_to_later_connects() {
    let addresses = [v4(1), v4(2)];
    let (port, _black_holes) = serve_at_last(&addresses).await;
    let layer = ConnectLayer::new().connect_timeout(SECOND * 60);
    let client = client_of!(layer.clone(), addresses);
    layer.handle().set_connect_timeout(ms(400)).unwrap();
    let response = soon(client.request(get_from("search", port))).await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn plain_client_does_not_send_requests_of_https_uris() {
    let client = Client::builder(ConnectLayer::new()).build_http();
    let request = Request::get("https://localhost/").body(Empty::<Bytes>::new()).unwrap();
    let error = soon(client.request(request)).await.unwrap_err();
    assert!(format!("{error:?}").contains("scheme is not http"), "{error:?}");
}

// ===== In namespaces =====

/// Runs the ignored test of this name in a network and mount namespace of its own, with these files in `/etc`.
fn in_namespace(test: &str, files: &[(&str, &str)]) {
    let directory = std::env::temp_dir().join(format!("bt-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let mut script = "ip link set lo up".to_owned();
    for (name, text) in files {
        std::fs::write(directory.join(name), text).unwrap();
        script += &format!(" && mount --bind {}/{name} /etc/{name}", directory.display());
    }
    let binary = std::env::current_exe().unwrap();
    let (_crate, module) = module_path!().split_once("::").unwrap();
    script +=
        &format!(" && exec {} --exact {module}::{test} --ignored --nocapture", binary.display());
    let probe = Command::new("unshare").args(["-m", "-n", "true"]).status();
    if !probe.is_ok_and(|status| status.success()) {
        let is_required = std::env::var_os("BUTTRESS_REQUIRE_REAL").is_some();
        assert!(!is_required, "cannot create namespaces");
        println!("skipped: cannot create namespaces");
        return;
    }
    let output =
        Command::new("unshare").args(["-m", "-n", "bash", "-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let _ = std::fs::remove_dir_all(&directory);
    assert!(output.status.success() && text.contains("1 passed"));
}

#[test]
fn every_client_made_here_reaches_the_second_address() {
    let hosts = "127.0.0.1 search\n127.0.0.2 search\n";
    in_namespace("every_client_made_here_reaches_the_second_address_inner", &[("hosts", hosts)]);
}

#[tokio::test]
#[ignore = "run by the test of the same name in a namespace"]
async fn every_client_made_here_reaches_the_second_address_inner() {
    let (port, _black_holes) = serve_at_last(&[v4(1), v4(2)]).await;
    let layer = || ConnectLayer::new().connect_timeout(SECOND);
    let client = Client::builder(layer()).build_http();
    assert_eq!(soon(client.request(get_from("search", port))).await.unwrap().status(), 200);
    {
        let client = Client::builder(layer()).build_https().unwrap();
        assert_eq!(soon(client.request(get_from("search", port))).await.unwrap().status(), 200);
    }
    {
        let config =
            buttress::config::ClientConfig::from_toml("connect_timeout = '1s'\nretry_attempts = 1");
        let client = buttress::client(&config.unwrap()).unwrap();
        assert_eq!(soon(client.request(get_from("search", port))).await.unwrap().status(), 200);
    }
}

#[test]
fn lookups_that_do_not_end_are_bounded() {
    let files = [
        ("hosts", "127.0.0.1 localhost\n"),
        ("nsswitch.conf", "hosts: files dns\n"),
        ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:3 attempts:1\n"),
    ];
    in_namespace("lookups_that_do_not_end_are_bounded_inner", &files);
}

/// Starts a DNS server that never responds. Records the names of all queries, with repetitions.
fn silent_dns() -> Arc<Mutex<Vec<Vec<u8>>>> {
    let queries = Arc::<Mutex<Vec<Vec<u8>>>>::default();
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    let seen = queries.clone();
    thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok(length) = socket.recv(&mut packet) {
            const TYPE_A: [u8; 2] = [0, 1];
            let question = &packet[12..length];
            let name_ends = question.iter().position(|byte| *byte == 0).unwrap();
            if question[name_ends + 1..].starts_with(&TYPE_A) {
                seen.lock().unwrap().push(question[..name_ends].to_vec());
            }
        }
    });
    queries
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[tokio::test]
#[ignore = "run by the test of the same name in a namespace"]
async fn lookups_that_do_not_end_are_bounded_inner() {
    const MAX_LOOKUPS: usize = 32;
    let queries = silent_dns();
    let layer = || ConnectLayer::new().max_per_host(2).connect_timeout(ms(20));

    // The control: with hyper-util's resolver, each connect that times out leaves a blocked thread behind.
    let before = threads();
    let connector = layer().layer(HttpConnector::new());
    let control = legacy::Client::builder(TokioExecutor::new()).build(connector);
    for _ in 0..10 {
        soon(control.request(get_from("control.test", 80))).await.unwrap_err();
    }
    assert!(threads() >= before + 10, "{} threads after {before}", threads());
    assert_eq!(queries.lock().unwrap().len(), 10);
    queries.lock().unwrap().clear();

    // One lookup per host.
    let layer = layer();
    let handle = layer.handle();
    let client = Client::builder(layer).build_http();
    let before = threads();
    for _ in 0..10 {
        let error = soon(client.request(get_from("search.test", 80))).await.unwrap_err();
        assert_eq!(Outcome::of_error(&*error).reason(), Reason::ConnectTimeout);
    }
    assert_eq!((handle.snapshot().lookups, handle.snapshot().timed_out), (1, 10));
    assert_eq!(queries.lock().unwrap().len(), 1);
    assert!(threads() <= before + 1, "{} threads after {before}", threads());

    // At most `MAX_LOOKUPS` lookups are in progress in total.
    let calls =
        (0..MAX_LOOKUPS + 20).map(|n| client.request(get_from(&format!("host{n}.test"), 80)));
    for call in futures_util::future::join_all(calls).await {
        call.unwrap_err();
    }
    assert_eq!(handle.snapshot().lookups, MAX_LOOKUPS);
    assert_eq!(queries.lock().unwrap().len(), MAX_LOOKUPS);

    // A lookup that has ended allows another one.
    let ended = AtomicUsize::new(0);
    while handle.snapshot().lookups > 0 {
        assert!(ended.fetch_add(1, SeqCst) < 500, "{:?}", handle.snapshot());
        sleep(ms(20)).await;
    }
    soon(client.request(get_from("localhost", 1))).await.unwrap_err();
    assert_eq!(handle.snapshot().lookups, 0);
    assert_eq!(handle.snapshot().failed, 1, "connection refused after a lookup that succeeded");
}
