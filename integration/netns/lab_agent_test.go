package netns_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// agentVariable in the environment makes this binary an agent.
const agentVariable = "PREROUTE_LAB_AGENT"

// An owner is whose sockets an agent opens.
type owner struct {
	uid, gid uint32
	netAdmin bool // CAP_NET_ADMIN kept, as a sidecar needs it for IP_TRANSPARENT
}

var (
	appOwner   = owner{uid: 1000, gid: 1000}
	rootOwner  = owner{uid: 0, gid: 0}
	proxyOwner = owner{uid: 2102, gid: 2102, netAdmin: true}
	gidOwner   = owner{uid: 1000, gid: 2102} // the proxy's by its group alone
)

// A request is one line to an agent; which fields count is up to Op (see
// lab_command_test.go).
type request struct {
	ID int
	Op string

	Who         string   // the name a server answers with
	Net         string   // tcp4, tcp6, udp4, udp6
	Addr        string   // where a server listens
	Transparent bool     // of a server: IP_TRANSPARENT; of a client: bind to any source
	Onward      string   // the source from which a proxy dials the original destination: "", an address, or "client"
	PacketInfo  bool     // a DNS server answers from the address it was asked at
	Local       string   // the source a client binds to, "address:port" or "address:0"
	Remotes     []string // where a client sends, in turn
	Say         string   // the first line a TCP client sends
	Unconnected bool     // a UDP client uses one socket that is not connected for all remotes
	Reuse       bool     // SO_REUSEADDR
	Device      string   // SO_BINDTODEVICE
	Count       int      // how often, how many at once
	Workers     int      // of Count queries, so many at once; 0: all
	Bytes       int      // how much is echoed over each connection
	TimeoutMS   int      // until a client gives up
}

// A view is how a server saw a connection or a query.
type view struct {
	Who   string // the server's name
	Peer  string // from whom
	Local string // the socket's own address
	Orig  string // SO_ORIGINAL_DST, when the kernel knows one
}

// An outcome is how one attempt of a client went.
type outcome struct {
	View  view
	Local string // the client's own address
	From  string // whose address a datagram came from
	Err   string // "refused", "timeout", or the text of another error
}

// An answer is the line that answers a request.
type answer struct {
	ID       int
	Err      string
	Outcomes []outcome
	Count    int
}

// An agent is a process in one namespace with one owner.
type agent struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser

	mu      sync.Mutex
	lastID  int
	waiting map[int]chan answer
	broken  error
}

// agent starts the agent with that owner in the pod, or finds it running.
func (p *pod) agent(o owner) *agent { p.t.Helper(); return p.agentIn(p.path, o) }

// outside is the agent in the world, root there.
func (p *pod) outside() *agent { p.t.Helper(); return p.agentIn(p.world, rootOwner) }

func (p *pod) agentIn(path string, o owner) *agent {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	key := fmt.Sprint(path, o)
	if a := p.started[key]; a != nil {
		return a
	}
	a, err := startAgent(p.t, path, o)
	if err != nil {
		p.t.Fatalf("starting an agent as UID %d in %s: %v", o.uid, path, err)
	}
	p.started[key] = a
	return a
}

func startAgent(t testing.TB, path string, o owner) (*agent, error) {
	// By this link the binary can be started whatever the modes of the folders
	// that go test put it in.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{agentVariable + "=1", "GOMAXPROCS=2"}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: o.uid, Gid: o.gid}}
	if o.netAdmin {
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN}
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := in(path, cmd.Start); err != nil {
		return nil, err
	}
	a := &agent{t: t, cmd: cmd, stdin: stdin, waiting: map[int]chan answer{}}
	go a.receive(stdout)
	return a, nil
}

// stop ends the agent: it leaves when its stdin is closed, which also happens
// when this process is killed.
func (a *agent) stop() {
	a.stdin.Close()
	timer := time.AfterFunc(5*time.Second, func() { a.cmd.Process.Kill() })
	defer timer.Stop()
	if err := a.cmd.Wait(); err != nil {
		a.t.Errorf("an agent ended with: %v", err)
	}
}

func (a *agent) receive(r io.Reader) {
	d := json.NewDecoder(r)
	for {
		var ans answer
		err := d.Decode(&ans)
		a.mu.Lock()
		if err != nil {
			a.broken = fmt.Errorf("reading from an agent: %w", err)
			for _, c := range a.waiting {
				close(c)
			}
			a.waiting = nil
			a.mu.Unlock()
			return
		}
		c := a.waiting[ans.ID]
		delete(a.waiting, ans.ID)
		a.mu.Unlock()
		c <- ans
	}
}

// start sends a request and returns a function that waits for its answer.
func (a *agent) start(r request) func() (answer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fail := func(err error) func() (answer, error) { return func() (answer, error) { return answer{}, err } }
	if a.broken != nil {
		return fail(a.broken)
	}
	a.lastID++
	r.ID = a.lastID
	line, err := json.Marshal(r)
	if err != nil {
		return fail(err)
	}
	c := make(chan answer, 1)
	a.waiting[r.ID] = c
	if _, err := a.stdin.Write(append(line, '\n')); err != nil {
		return fail(fmt.Errorf("writing to an agent: %w", err))
	}
	return func() (answer, error) {
		select {
		case ans, ok := <-c:
			if !ok {
				return answer{}, errors.New("the agent ended without an answer")
			}
			if ans.Err != "" {
				return ans, fmt.Errorf("%s %s: %s", r.Op, r.Addr, ans.Err)
			}
			return ans, nil
		case <-time.After(time.Minute):
			return answer{}, fmt.Errorf("no answer to %s within a minute", line)
		}
	}
}

// do sends a request and waits for its answer; a failure ends the test.
func (a *agent) do(r request) answer {
	a.t.Helper()
	ans, err := a.start(r)()
	if err != nil {
		a.t.Fatal(err)
	}
	return ans
}

// serve makes the agent listen under a name, at each of the addresses, both
// "10.77.0.2:80" and ":80" (the wildcard of each family).
func (a *agent) serve(r request, addrs ...string) {
	a.t.Helper()
	for _, addr := range addrs {
		nets := []string{"4", "6"}
		if strings.HasPrefix(addr, "[") {
			nets = nets[1:]
		} else if !strings.HasPrefix(addr, ":") {
			nets = nets[:1]
		}
		for _, family := range nets {
			q := r
			q.Net, q.Addr = strings.TrimRight(r.Net, "46")+family, addr
			a.do(q)
		}
	}
}

// agentMain answers requests until stdin ends.
func agentMain(r io.Reader, w io.Writer) int {
	var mu sync.Mutex
	out := json.NewEncoder(w)
	s := &servers{accepted: map[string]int{}}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var req request
		if err := json.Unmarshal(lines.Bytes(), &req); err != nil {
			fmt.Fprintln(os.Stderr, "agent: a bad request:", err)
			return 1
		}
		go func() {
			ans := s.command(req)
			ans.ID = req.ID
			mu.Lock()
			defer mu.Unlock()
			if err := out.Encode(ans); err != nil {
				os.Exit(0) // nobody reads any more
			}
		}()
	}
	return 0
}
