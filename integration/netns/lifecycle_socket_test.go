package netns_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The two sockets of the node: report.sock, which hears of every run, and the
// one that nodeSocket names, which knows the policies where the runtime cannot
// pass annotations.

const reportSocket = "/run/preroute/report.sock"

// deadSocket leaves the file of a datagram socket that nobody reads.
func deadSocket(dir, name string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unixgram"})
	if err != nil {
		return err
	}
	return c.Close() // which does not remove the file
}

// streamSocket leaves the file of a stream socket.
func streamSocket(dir, name string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	return l.Close()
}

// listen takes the reports of a room.
func (r *room) listen() *net.UnixConn {
	r.t.Helper()
	var c *net.UnixConn
	r.must(func() (err error) {
		if err := os.MkdirAll(filepath.Dir(reportSocket), 0o755); err != nil {
			return err
		}
		c, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: reportSocket, Net: "unixgram"})
		return err
	})
	r.t.Cleanup(func() { c.Close() })
	return c
}

// reports are the datagrams that have arrived.
func reports(t *testing.T, c *net.UnixConn) []string {
	t.Helper()
	var out []string
	buf := make([]byte, 1<<16)
	for {
		// What has been sent is there: a datagram is queued before sendto returns.
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := c.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(buf[:n]))
	}
}

func TestReports(t *testing.T) {
	p := bare(t)
	r := newRoom(t)
	c := r.listen()
	for _, tt := range []struct {
		name, policy string
		fails        bool
		want         []string // in the report
	}{
		{"a good ADD", policyNGINX, false, []string{p.name}},
		{"a second one", policyNGINX, false, []string{p.name}},
		{"a bad policy", `{"v":1,"outbound":{"exceptPorts":"*"}}`, true, []string{p.name, "outbound.exceptPorts"}},
	} {
		l := p.launch("ADD", tt.policy)
		l.room = r
		if res := l.must(t); (res.exit != 0) != tt.fails {
			t.Fatalf("%s: %v", tt.name, res.err())
		}
		got := reports(t, c)
		if len(got) != 1 {
			t.Fatalf("%s: %d reports, want one: %q", tt.name, len(got), got)
		}
		var doc map[string]any
		if err := json.Unmarshal([]byte(got[0]), &doc); err != nil {
			t.Errorf("%s: the report is not JSON: %v\n%s", tt.name, err, got[0])
		}
		for _, want := range tt.want {
			if !strings.Contains(got[0], want) {
				t.Errorf("%s: the report does not name %s: %s", tt.name, want, got[0])
			}
		}
		t.Logf("%s: %s", tt.name, got[0])
	}
	// Z1: of a pod that is not ours nothing is said.
	l := p.launch("ADD", "")
	l.room = r
	l.must(t)
	if got := reports(t, c); len(got) > 0 {
		t.Errorf("a pod without a policy is reported: %q", got)
	}
}

// TestFullReportSocket leaves the reports unread: no ADD waits or fails.
func TestFullReportSocket(t *testing.T) {
	p := bare(t)
	r := newRoom(t)
	c := r.listen()
	c.SetReadBuffer(1) // the kernel's least
	// Fill the queue, whose length is a sysctl (max_dgram_qlen).
	r.must(func() error {
		w, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: reportSocket, Net: "unixgram"})
		if err != nil {
			return err
		}
		defer w.Close()
		for {
			w.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := w.Write(make([]byte, 1000)); err != nil {
				return nil
			}
		}
	})
	for range 5 {
		l := p.launch("ADD", policyNGINX)
		l.room = r
		start := time.Now()
		if err := l.must(t).err(); err != nil {
			t.Fatalf("with an unread report socket: %v", err)
		}
		// Far above what an ADD takes on a busy machine, far below any timeout.
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("an ADD waited %v for the report socket", d)
		}
	}
	same(t, "with an unread report socket", shape(p.exact()), freshly(t, policyNGINX))
}

// A node answers the plugin's questions on a socket as the installer would.
type node struct {
	path  string
	asked chan string
}

// newNode serves one line for each line; answer "" means that it never answers.
func newNode(t *testing.T, answer string) *node {
	t.Helper()
	dir, err := os.MkdirTemp(lab.dir, "node-")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{path: filepath.Join(dir, "node.sock"), asked: make(chan string, 100)}
	l, err := net.Listen("unix", n.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				line, _ := bufio.NewReader(c).ReadString('\n')
				n.asked <- line
				if answer == "" {
					c.Read(make([]byte, 1)) // until the plugin gives up
					return
				}
				fmt.Fprint(c, answer)
			}()
		}
	}()
	return n
}

func jsonText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func TestNodeSocket(t *testing.T) {
	says := func(policy string) string {
		return jsonText(map[string]any{"v": 1, "path": "cni", "policy": policy}) + "\n"
	}
	nginx, kuma, untouched := freshly(t, policyNGINX), freshly(t, policyKuma), shape(bare(t).exact())
	inNamespace := func(ns string) option {
		return func(c *call) {
			c.env["CNI_ARGS"] = "IgnoreUnknown=1;K8S_POD_NAMESPACE=" + ns + ";K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=11111111-2222-3333-4444-555555555555"
		}
	}
	for _, tt := range []struct {
		name, answer string
		policy       string
		opts         []option
		want         string
		fails        string // in the error; "" means that ADD succeeds
		asked        bool
	}{
		{name: "a policy", answer: says(policyKuma), want: kuma, asked: true},
		{name: "no policy", answer: says(""), want: untouched, asked: true},
		{name: "path init", answer: `{"v":1,"path":"init","policy":` + jsonText(policyKuma) + "}\n", want: untouched, asked: true},
		{name: "path none", answer: `{"v":1,"path":"none","policy":""}` + "\n", want: untouched, asked: true},
		{name: "a bad policy", answer: says(`{"v":1,"dns":{"port":"x"}}`), want: untouched, fails: `dns.port: "x"`, asked: true},
		{name: "an error", answer: `{"v":1,"error":"the pod is not in the cache yet"}` + "\n", want: untouched, fails: "the pod is not in the cache yet", asked: true},
		{name: "garbage", answer: "HTTP/1.1 400 Bad Request\r\n\r\n", want: untouched, fails: "node.sock", asked: true},
		{name: "an empty line", answer: "\n", want: untouched, fails: "node.sock", asked: true},
		{name: "half a line", answer: `{"v":1,"path":"cni","poli`, want: untouched, fails: "node.sock", asked: true},
		{name: "silence", answer: "", want: untouched, fails: "node.sock", asked: true},
		{name: "silence, excluded namespace", answer: "", opts: []option{inNamespace("kube-system")}, want: untouched},
		{name: "garbage, excluded by configuration", answer: "x\n", opts: []option{inNamespace("mine"), withConf("excludeNamespaces", []string{"mine"})}, want: untouched},
		{name: "the annotation is there", answer: says(policyKuma), policy: policyNGINX, want: nginx},
		{name: "path none is there", answer: says(policyKuma), opts: []option{withAnnotation("preroute.io/path", "none")}, want: untouched},
		{name: "the conflist has a policy", answer: says(policyKuma), opts: []option{withConf("policy", json.RawMessage(policyNGINX))}, want: nginx},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // silence is waited for
			n := newNode(t, tt.answer)
			p := bare(t)
			opts := append([]option{withConf("nodeSocket", n.path), inNamespace("shop")}, tt.opts...)
			r := p.add(tt.policy, opts...)
			if tt.fails == "" {
				if err := r.err(); err != nil {
					t.Fatalf("ADD: %v", err)
				}
			} else {
				oneDocument(t, r.stdout)
				if r.cniErr == nil || !strings.Contains(r.cniErr.Error(), tt.fails) {
					t.Fatalf("want a CNI error with %q, got %v", tt.fails, r.err())
				}
				t.Log(r.cniErr)
			}
			same(t, "the namespace", shape(p.exact()), tt.want)
			if !tt.asked {
				return
			}
			var q map[string]any
			if err := json.Unmarshal([]byte(<-n.asked), &q); err != nil {
				t.Fatalf("the question is not JSON: %v", err)
			}
			for key, want := range map[string]any{
				"v": 1.0, "containerID": p.name, "netns": p.path, "ifName": "eth0",
				"namespace": "shop", "name": "web-0", "uid": "11111111-2222-3333-4444-555555555555",
			} {
				if q[key] != want {
					t.Errorf("the question's %s is %v, want %v", key, q[key], want)
				}
			}
		})
	}

	t.Run("nobody listens", func(t *testing.T) {
		p := bare(t)
		dead := withConf("nodeSocket", "/nonexistent/node.sock")
		r := p.add("", dead, inNamespace("shop"))
		if r.cniErr == nil || !strings.Contains(r.cniErr.Error(), "/nonexistent/node.sock") {
			t.Errorf("want a CNI error that names the socket, got %v", r.err())
		} else {
			t.Log(r.cniErr)
		}
		for _, ns := range []string{"kube-system", "kube-public", "kube-node-lease", "preroute-system"} {
			if err := p.add("", dead, inNamespace(ns)).err(); err != nil {
				t.Errorf("a pod of %s: %v", ns, err)
			}
		}
		same(t, "pods without a policy", shape(p.exact()), untouched)
		if err := p.add(policyNGINX, dead, inNamespace("shop")).err(); err != nil {
			t.Errorf("a pod with an annotation: %v", err)
		}
		if err := p.del("", dead, inNamespace("shop")).err(); err != nil {
			t.Errorf("DEL: %v", err)
		}
	})

	t.Run("not asked without need", func(t *testing.T) {
		n := newNode(t, says(policyKuma))
		p := bare(t)
		p.mustAdd(policyNGINX, withConf("nodeSocket", n.path))
		p.mustAdd(policyNone, withConf("nodeSocket", n.path))
		p.mustAdd(policyNGINX, withConf("nodeSocket", n.path), withAnnotation("preroute.io/path", "init"))
		// Nor by DEL, which must not wait for anybody.
		if err := p.del("", withConf("nodeSocket", n.path)).err(); err != nil {
			t.Errorf("DEL: %v", err)
		}
		select {
		case q := <-n.asked:
			t.Errorf("the node was asked %s", q)
		default:
		}
	})
}
