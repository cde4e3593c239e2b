// An HTTP/1.1 server that responds `ok` to every request, and closes a connection that is idle for one second. Some
// versions of Node.js add a second to this time.
const http = require("http");

const server = http.createServer((request, response) => {
  response.end("ok");
});
server.keepAliveTimeout = 1000;
server.listen({ port: 0, host: "127.0.0.1", backlog: 1024 }, () => console.log(server.address().port));

process.stdin.resume();
process.stdin.on("end", () => process.exit(0));
