package netns_test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// haproxyConfig is HAProxy as a sidecar. A server without an address of its own
// is the connection's original destination, for which HAProxy asks the kernel by
// SO_ORIGINAL_DST, or takes the socket's own address on a transparent listener.
// HAProxy 2.6 does not ask for IPv6 (IP6T_SO_ORIGINAL_DST), so there it is told
// the one server it may get connections for. maxconn bounds the harm where a
// connection of its own comes back to it.
const haproxyConfig = `
global
  maxconn 400
defaults
  mode tcp
  retries 0
  timeout connect 5s
  timeout client 20s
  timeout server 20s
frontend outbound4
  bind 0.0.0.0:8900
  default_backend original
frontend outbound6
  bind [::]:8900 v6only
  default_backend world6
backend original
  server destination 0.0.0.0:0
backend world6
  server destination [2001:db8:1::9]:80
frontend inbound4
  bind 0.0.0.0:8901 %[1]s
  default_backend app
frontend inbound6
  bind [::]:8901 v6only %[1]s
  default_backend %[2]s
backend app
  %[3]s
  server destination 0.0.0.0:0
backend app6
  server destination [fd00:77::2]:80
`

// startHAProxy runs HAProxy from Debian as UID and GID 2102 in the pod until the
// test is over. With the client's address it keeps CAP_NET_ADMIN, as a sidecar
// of that kind does.
func (p *pod) startHAProxy(t *testing.T, config string, netAdmin bool) {
	t.Helper()
	file := filepath.Join(lab.dir, p.name+".haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	var output bytes.Buffer
	cmd := exec.Command("haproxy", "-db", "-f", file)
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: proxyOwner.uid, Gid: proxyOwner.gid}}
	if netAdmin {
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN}
	}
	if err := in(p.path, cmd.Start); err != nil {
		t.Fatalf("starting haproxy: %v; install the package haproxy", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("haproxy said: %s", output.String())
		}
	})
	// Asking it by a connection would make it connect to itself.
	for deadline := time.Now().Add(patience); !listening(cmd.Process.Pid, "8900", "8901"); {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("haproxy ended: %v\n%s", err, output.String())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatal("haproxy does not listen")
		}
	}
}

// listening reports whether the namespace of a process has IPv4 and IPv6
// listeners on all of the ports.
func listening(pid int, ports ...string) bool {
	for _, file := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, file))
		if err != nil {
			return false
		}
		for _, port := range ports {
			n, err := net.LookupPort("tcp", port)
			if err != nil {
				return false
			}
			found := false
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				found = found || len(f) > 3 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", n)) && f[3] == "0A"
			}
			if !found {
				return false
			}
		}
	}
	return true
}

// A proxy that nobody here wrote: HAProxy gets both directions, asks for the
// original destination by itself, and everything arrives, in both families.
func TestHAProxy(t *testing.T) {
	for _, c := range []struct {
		name, policy   string
		listen, onward string
		clientsAddress bool
	}{
		{"redirect", `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"9050"}}`, "", "", false},
		{"redirect, by GID", `{"v":1,"proxy":{"gids":[2102]},"inbound":{"port":8901,"exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"9050"}}`, "", "", false},
		{"tproxy", `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"tproxy","exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"9050"}}`, "transparent", "", false},
		{"tproxy, the client's address", `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"tproxy","exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"9050"}}`, "transparent", "source 0.0.0.0 usesrc clientip", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, f := range flavours() {
				t.Run(f.name, func(t *testing.T) {
					t.Parallel()
					p := newPod(t)
					p.mustAdd(c.policy, using(f))
					p.outside().serve(request{Op: "listen", Who: "world", Net: "tcp"}, ":80", ":9050")
					p.agent(appOwner).serve(request{Op: "listen", Who: "app", Net: "tcp"}, ":80", ":8887")
					inbound6 := "app6"
					if c.listen != "" {
						inbound6 = "app"
					}
					p.startHAProxy(t, fmt.Sprintf(haproxyConfig, c.listen, inbound6, c.onward), c.listen != "")
					for _, family := range []string{"4", "6"} {
						haproxyCarries(t, p, family, c.clientsAddress)
						if family == "6" && c.listen == "" {
							continue // it was told the server, whatever the destination
						}
						// Nobody listens: HAProxy takes the connection and cannot pass it on.
						r := request{Op: "dial", Net: "tcp" + family, Remotes: []string{at(family, "pod", "7777")}, Say: "describe"}
						if got := p.outside().do(r).Outcomes[0]; got.Local == "" || got.View.Who != "" {
							t.Errorf("IPv%s, in to a port without a listener: got %+v", family, got)
						}
					}
					if t.Failed() {
						t.Log(p.dump())
					}
				})
			}
		})
	}
}

func haproxyCarries(t *testing.T, p *pod, family string, clientsAddress bool) {
	t.Helper()
	app, outside := p.agent(appOwner), p.outside()
	dial := func(a *agent, name, port string) outcome {
		return a.do(request{Op: "dial", Net: "tcp" + family, Remotes: []string{at(family, name, port)}, Say: "describe"}).Outcomes[0]
	}
	// Out: the world sees the proxy's connection, not the app's.
	if got := dial(app, "far", "80"); got.Err != "" || got.View.Who != "world" || got.View.Local != at(family, "far", "80") || got.View.Peer == got.Local {
		t.Errorf("IPv%s, out through HAProxy: got %+v", family, got)
	}
	if got := dial(app, "far", "9050"); got.View.Who != "world" || got.View.Peer != got.Local {
		t.Errorf("IPv%s, out by an excepted port: got %+v", family, got)
	}
	// In: the app sees HAProxy, from the pod's own address or from the client's.
	got := dial(outside, "pod", "80")
	if got.Err != "" || got.View.Who != "app" || got.View.Local != at(family, "pod", "80") || got.View.Peer == got.Local {
		t.Errorf("IPv%s, in through HAProxy: got %+v", family, got)
	}
	if sameHost(got.View.Peer, got.Local) != clientsAddress {
		t.Errorf("IPv%s, in through HAProxy: the app sees %s as its peer, the client is %s", family, got.View.Peer, got.Local)
	}
	if got := dial(outside, "pod", "8887"); got.View.Who != "app" || got.View.Peer != got.Local {
		t.Errorf("IPv%s, in by an excepted port: got %+v", family, got)
	}
	for name, a := range map[string]*agent{"far": app, "pod": outside} {
		r := request{Op: "echo", Net: "tcp" + family, Remotes: []string{at(family, name, "80")}, Say: "echo", Count: 50, Bytes: 128 << 10}
		for _, got := range a.do(r).Outcomes {
			if got.Err != "" {
				t.Errorf("IPv%s, data to %s through HAProxy: %s", family, name, got.Err)
				break
			}
		}
	}
}
