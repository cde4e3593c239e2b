//! A client that vanishes: its host no longer responds, and no FIN or RST arrives. The client runs in a network
//! namespace, whose address is then removed.

use std::{
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
};

use super::*;
use crate::support::net::until;

/// A network namespace, connected to this one. Dropping it deletes both ends.
struct Namespace {
    name: String,
    server: Ipv4Addr,
    clients: Vec<Child>,
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    output.is_ok_and(|output| output.status.success())
}

impl Namespace {
    /// `None` if this process may not create namespaces.
    fn new(subnet: u8) -> Option<Self> {
        let name = format!("bt{}x{subnet}", std::process::id());
        let server = Ipv4Addr::new(10, 213, subnet, 1);
        let namespace = Self { name, server, clients: Vec::new() };
        let Self { name, .. } = &namespace;
        let commands = [
            format!("netns add {name}"),
            format!("link add {name}a type veth peer name {name}b netns {name}"),
            format!("addr add {server}/24 dev {name}a"),
            format!("link set {name}a up"),
            format!("-n {name} addr add 10.213.{subnet}.2/24 dev {name}b"),
            format!("-n {name} link set {name}b up"),
        ];
        commands.iter().all(|command| ip(command)).then_some(namespace)
    }

    /// A client that sends the bytes (as `printf` writes them) and then keeps the connection open and silent.
    fn client(&mut self, port: u16, bytes: &str) {
        let script = format!(
            "exec 3<>/dev/tcp/{}/{port}; printf '{bytes}' >&3; exec cat <&3 >/dev/null",
            self.server
        );
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "bash", "-c", &script]);
        self.clients.push(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    }

    /// Removes the address of the clients: packets to them are no longer acknowledged.
    fn vanish(&self) {
        assert!(ip(&format!("-n {0} addr flush dev {0}b", self.name)));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        for client in &mut self.clients {
            let _ = client.kill();
            let _ = client.wait();
        }
        let _ = ip(&format!("link del {}a", self.name));
        let _ = ip(&format!("netns del {}", self.name));
    }
}

/// Serves silent streams over HTTP/1 and HTTP/2 to clients that vanish. Returns the time until all permits are
/// released, or `None` without namespaces.
async fn time_to_release(
    subnet: u8,
    max: Duration,
    set: impl FnOnce(Server) -> Server,
) -> Option<Duration> {
    let Some(mut namespace) = Namespace::new(subnet) else {
        assert!(!programs::are_required(), "cannot create a network namespace");
        println!("skipped: cannot create a network namespace");
        return None;
    };
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let (app, calls) = app();
    let listener = tokio::net::TcpListener::bind((namespace.server, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(set(lifecycle.server()).serve(listener, app));
    namespace.client(port, "GET /events HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n");
    until(|| calls.in_flight() == 1).await;
    sleep(ms(100)).await;
    namespace.vanish();
    let began = Instant::now();
    while calls.in_flight() > 0 {
        assert!(began.elapsed() < max, "the permit of a vanished client is held");
        sleep(ms(20)).await;
    }
    Some(began.elapsed())
}

#[tokio::test]
async fn permit_of_a_silent_stream_is_released_when_its_client_has_vanished() {
    let set = |server: Server| server.tcp_user_timeout(Duration::from_secs(3));
    if let Some(time) = time_to_release(1, Duration::from_secs(10), set).await {
        println!("released after {time:?}");
    }
}

/// With the defaults it takes up to 60 s, and so is left to `--ignored`.
#[tokio::test]
#[ignore = "takes a minute"]
async fn permit_of_a_silent_stream_is_released_within_a_minute_by_default() {
    let max = Duration::from_secs(60);
    if let Some(time) = time_to_release(2, max, |server| server).await {
        println!("released after {time:?}");
    }
}
