package netns_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// L7 and L8: what the plugin needs of its host, and what it keeps away from.

// TestNoHostProgramIsNeeded runs it in a room whose root is read-only and which
// has no PATH; the namespace never gets a legacy table.
func TestNoHostProgramIsNeeded(t *testing.T) {
	for _, backend := range []string{"nft", "auto"} {
		p := bare(t)
		r := newRoom(t)
		r.must(func() error {
			return errors.Join(
				unix.Mount("", "/run", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""),
				unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
		})
		for _, pol := range []string{policyNGINX, policyKuma, policyTProxy} {
			for _, command := range []string{"ADD", "CHECK", "DEL", "ADD"} {
				l := p.launch(command, pol, withConf("backend", backend))
				delete(l.env, "PATH")
				l.room = r
				if err := l.must(t).err(); err != nil {
					t.Errorf("%s by %s on a read-only host without PATH: %v", command, backend, err)
				}
			}
			same(t, backend, shape(p.exact()), freshly(t, pol, withConf("backend", "nft")))
		}
		for _, family := range []string{"ip", "ip6"} {
			if tables := p.legacyTables(family); len(tables) > 0 {
				t.Errorf("by %s: legacy tables of %s were made: %q", backend, family, tables)
			}
		}
	}
}

// TestIPTablesWithoutPrograms asks for a backend that cannot be had: in a room
// where the folders of such programs are empty.
func TestIPTablesWithoutPrograms(t *testing.T) {
	p := bare(t)
	before := p.exact()
	r := newRoom(t)
	r.must(func() error {
		var errs []error
		for _, dir := range []string{"/usr/sbin", "/usr/bin"} {
			errs = append(errs, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
		}
		return errors.Join(errs...)
	})
	l := p.launch("ADD", policyNGINX, withConf("backend", "iptables"))
	l.room = r
	res := l.must(t)
	if res.cniErr == nil || !strings.Contains(res.cniErr.Error(), "iptables") {
		t.Errorf("want a CNI error that names iptables, got %v", res.err())
	} else {
		t.Log(res.cniErr)
	}
	same(t, "a failed ADD changed something", p.exact(), before)
}

// TestNoLegacyTables holds that the nft flavour of iptables, and the looking for
// a flavour, make no legacy table.
func TestNoLegacyTables(t *testing.T) {
	for _, backend := range []string{"auto", "nft", "iptables"} {
		p := bare(t)
		o := withConf("backend", backend)
		p.mustAdd(policyKuma, o)
		if err := p.check(policyKuma, o).err(); err != nil {
			t.Errorf("CHECK: %v", err)
		}
		p.mustAdd(policyNone, o)
		for _, family := range []string{"ip", "ip6"} {
			if tables := p.legacyTables(family); len(tables) > 0 {
				t.Errorf("backend %s: legacy tables of %s were made: %q", backend, family, tables)
			}
		}
	}
}

// agentCopy is this test binary where every UID can start it.
var agentCopy = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	file := filepath.Join(lab.dir, "agent")
	return file, os.WriteFile(file, b, 0o755)
})

// userPod is a pod as with hostUsers: false: a user namespace of its own, whose
// IDs are the host's 100000 and up, owns its network namespace.
func userPod(t *testing.T) (p *pod, holder int) {
	t.Helper()
	copied, err := agentCopy()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(copied)
	cmd.Env = []string{agentVariable + "=1"}
	cmd.Stderr = os.Stderr
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, UidMappings: ids, GidMappings: ids,
		Credential: &syscall.Credential{},
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting the process that holds the user namespace: %v", err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})

	p = barePod(t)
	t.Cleanup(p.close)
	if err := os.WriteFile(p.path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid), p.path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(p.path)
		t.Fatalf("binding the network namespace: %v", err)
	}
	if err := makeNetns(filepath.Base(p.world)); err != nil {
		t.Fatal(err)
	}
	p.sysctl("net/ipv4/ip_unprivileged_port_start", "0")
	p.exec("ip", "link", "set", "lo", "up")
	if err := p.wire(); err != nil {
		t.Fatalf("wiring: %v", err)
	}
	return p, cmd.Process.Pid
}

// userAgent is an agent with a UID of the user namespace.
func (p *pod) userAgent(holder int, uid string) *agent {
	p.t.Helper()
	copied, err := agentCopy()
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("nsenter", "--target", fmt.Sprint(holder), "--user", "--net", "--setuid", uid, "--setgid", uid, copied)
	cmd.Env = []string{agentVariable + "=1", "GOMAXPROCS=2", "PATH=" + os.Getenv("PATH")}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	a := &agent{t: p.t, cmd: cmd, stdin: stdin, waiting: map[int]chan answer{}}
	go a.receive(io.Reader(stdout))
	p.t.Cleanup(a.stop)
	return a
}

func TestUserNamespacePod(t *testing.T) {
	p, holder := userPod(t)
	opts := []option{withConf("backend", "nft"), withEnv("PATH", lab.bare)}
	p.mustAdd(policyNGINX, opts...)
	if err := p.check(policyNGINX, opts...).err(); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	for _, family := range []string{"ip", "ip6"} {
		if tables := p.legacyTables(family); len(tables) > 0 {
			t.Errorf("legacy tables of %s were made: %q", family, tables)
		}
	}
	first := p.exact()
	p.mustAdd(policyNGINX, opts...)
	same(t, "the second ADD", p.exact(), first)

	app, proxy := p.userAgent(holder, "1000"), p.userAgent(holder, "2102")
	proxy.serve(request{Op: "listen", Who: "outbound", Net: "tcp"}, ":8900")
	proxy.serve(request{Op: "listen", Who: "inbound", Net: "tcp"}, ":8901")
	app.serve(request{Op: "listen", Who: "app", Net: "tcp"}, ":8080", ":8887")
	p.outside().serve(request{Op: "listen", Who: "world", Net: "tcp"}, ":80")
	for _, tt := range []struct {
		what string
		from *agent
		net  string
		to   string
		want string
		orig string
	}{
		{"the app, IPv4", app, "tcp4", "198.51.100.9:80", "outbound", "198.51.100.9:80"},
		{"the app, IPv6", app, "tcp6", "[2001:db8::9]:80", "outbound", "[2001:db8::9]:80"},
		{"the proxy, IPv4", proxy, "tcp4", "198.51.100.9:80", "world", ""},
		{"the proxy, IPv6", proxy, "tcp6", "[2001:db8::9]:80", "world", ""},
		{"outside, IPv4", p.outside(), "tcp4", hostPort(podIPv4.Addr().String(), "8080"), "inbound", hostPort(podIPv4.Addr().String(), "8080")},
		{"outside, IPv6", p.outside(), "tcp6", hostPort(podIPv6.Addr().String(), "8080"), "inbound", hostPort(podIPv6.Addr().String(), "8080")},
		{"outside to an excepted port", p.outside(), "tcp4", hostPort(podIPv4.Addr().String(), "8887"), "app", ""},
	} {
		got := tt.from.do(request{Op: "dial", Net: tt.net, Remotes: []string{tt.to}, Say: "describe"}).Outcomes[0]
		if got.Err != "" || got.View.Who != tt.want || (tt.orig != "" && got.View.Orig != tt.orig) {
			t.Errorf("%s to %s: got %+v, want %s with the original destination %s", tt.what, tt.to, got, tt.want, tt.orig)
		}
	}
}

// TestInitInUserNamespace runs the pod-side commands in such a pod, as the root
// and the nobody that it has.
func TestInitInUserNamespace(t *testing.T) {
	p, holder := userPod(t)
	inside := func(uid, command string, args ...string) launch {
		l := p.command(policyKuma, append([]string{command}, args...)...)
		l.netns = ""
		return l.under("nsenter", "--target", fmt.Sprint(holder), "--user", "--net", "--setuid", uid, "--setgid", uid)
	}
	before := inside("65534", "verify", "--wait", "0s")
	before.env["PREROUTE_POLICY"] = policyNGINX // which takes less time to be found missing
	if r := before.must(t); r.exit != 95 {
		t.Errorf("verify before init: exit status %d: %s", r.exit, r.stderr)
	}
	for i := range 2 {
		r := inside("0", "init").must(t)
		if r.exit != 0 || strings.Contains(r.stdout, "already") != (i == 1) {
			t.Fatalf("init, time %d: exit status %d: %s%s", i+1, r.exit, r.stdout, r.stderr)
		}
	}
	if r := inside("65534", "verify", "--wait", "0s").must(t); r.exit != 0 {
		t.Errorf("verify: exit status %d: %s", r.exit, r.stderr)
	}
	if err := p.check(policyKuma).err(); err != nil {
		t.Errorf("CHECK from the host: %v", err)
	}
}

// TestHostNamespaceIsRefused runs the plugin in a namespace that plays the
// host's, so that a plugin that did not refuse would harm nothing.
func TestHostNamespaceIsRefused(t *testing.T) {
	host := bare(t)
	before := host.exact()
	refused := func(t *testing.T, r result) {
		t.Helper()
		oneDocument(t, r.stdout)
		if r.cniErr == nil || r.cniErr.Code != 8 || !strings.Contains(r.cniErr.Error(), "host") {
			t.Errorf("want CNI error 8 that speaks of the host's namespace, got %v", r.err())
		} else {
			t.Log(r.cniErr)
		}
		same(t, "the host's namespace was changed", host.exact(), before)
	}
	for _, path := range []string{"/proc/self/ns/net", "/proc/thread-self/ns/net", host.path} {
		t.Run("the plugin's own by "+path, func(t *testing.T) {
			l := host.launch("ADD", policyNGINX, withEnv("CNI_NETNS", path))
			l.netns = host.path
			refused(t, l.must(t))
			l = host.launch("ADD", "", withEnv("CNI_NETNS", path))
			l.netns = host.path
			if err := l.must(t).err(); err != nil {
				t.Errorf("L6: a pod without a policy: %v", err)
			}
		})
	}
	// The plugin may run in another namespace than the host's (a daemon that
	// delegates); process 1 is in the host's. Here that is a shell.
	t.Run("that of process 1", func(t *testing.T) {
		other := bare(t)
		l := host.launch("ADD", policyNGINX, withEnv("CNI_NETNS", "/proc/1/ns/net"))
		l.netns = host.path
		l.argv = []string{
			"unshare", "--pid", "--fork", "--mount-proc", "sh", "-c",
			`nsenter --net="$0" "$@"; exit $?`, other.path, lab.plugin,
		}
		refused(t, l.must(t))
		same(t, "the plugin's own namespace was changed", shape(other.exact()), shape(before))
	})
	t.Run("DEL leaves it alone", func(t *testing.T) {
		l := host.launch("DEL", policyNGINX, withEnv("CNI_NETNS", "/proc/self/ns/net"))
		l.netns = host.path
		if err := l.must(t).err(); err != nil {
			t.Errorf("DEL: %v", err)
		}
		same(t, "DEL", host.exact(), before)
	})
}
