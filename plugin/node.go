package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The two sockets by which the plugin meets the node's installer. Neither is
// needed for a pod to start.

// reportSocket is where the installer listens for one datagram per run.
const reportSocket = "/run/preroute/report.sock"

// askTimeout bounds the wait for the node's socket. kubelet tries a sandbox
// again by itself.
const askTimeout = 3 * time.Second

// podArgs is the pod as CNI_ARGS names it, and its sandbox.
type podArgs struct {
	V           int    `json:"v"`
	ContainerID string `json:"containerID"`
	NetNS       string `json:"netns"`
	IfName      string `json:"ifName"`
	Namespace   string `json:"namespace"`
	Name        string `json:"name"`
	UID         string `json:"uid"`
}

// parsePodArgs reads CNI_ARGS, "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;…". What is
// not there stays empty.
func parsePodArgs(args string) podArgs {
	p := podArgs{V: 1}
	for pair := range strings.SplitSeq(args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			p.Namespace = value
		case "K8S_POD_NAME":
			p.Name = value
		case "K8S_POD_UID":
			p.UID = value
		}
	}
	return p
}

// nodeAnswer is what the node's socket says of a pod.
type nodeAnswer struct {
	V      int    `json:"v"`
	Path   string `json:"path"`
	Policy string `json:"policy"` // "" for a pod without one
	Error  string `json:"error"`
}

// askNode asks the installer for a pod's policy: one line of JSON each way.
func askNode(socket string, pod podArgs) (*nodeAnswer, error) {
	answer, err := exchange(socket, pod)
	if err != nil {
		return nil, fmt.Errorf("nodeSocket: %s: the policy of pod %s/%s cannot be learnt: %w; is the preroute-installer of this node running?",
			socket, pod.Namespace, pod.Name, err)
	}
	return answer, nil
}

func exchange(socket string, pod podArgs) (*nodeAnswer, error) {
	conn, err := net.DialTimeout("unix", socket, askTimeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(askTimeout)); err != nil {
		return nil, err
	}
	if err := json.NewEncoder(conn).Encode(pod); err != nil {
		return nil, err
	}
	const most = 1 << 20 // above the 256 KiB that Kubernetes allows all annotations of an object
	line, err := bufio.NewReader(io.LimitReader(conn, most)).ReadBytes('\n')
	if len(line) == 0 && err != nil {
		return nil, fmt.Errorf("no answer: %w", err)
	}
	if len(line) == most {
		return nil, errors.New("the answer is too long")
	}
	var answer nodeAnswer
	if err := json.Unmarshal(line, &answer); err != nil {
		return nil, fmt.Errorf("the answer is not JSON: %w", err)
	}
	if answer.V != 1 {
		return nil, fmt.Errorf("the answer has version %d; this build knows 1", answer.V)
	}
	if answer.Error != "" {
		return nil, errors.New(answer.Error)
	}
	return &answer, nil
}

// A report is one run of the plugin for a pod with a policy.
type report struct {
	podArgs
	Command string    `json:"command"`
	Time    time.Time `json:"time"`    // of the start
	Seconds float64   `json:"seconds"` // from there to the result
	Backend string    `json:"backend,omitempty"`
	Reason  string    `json:"reason,omitempty"` // why not the first choice of backend
	Changed bool      `json:"changed"`
	Result  string    `json:"result"` // "ok" or "error"
	Code    uint      `json:"code,omitempty"`
	Error   string    `json:"error,omitempty"`
}

// send passes the report on, if somebody listens and has room for it. It never
// waits, and nobody minds when it fails.
func (r *report) send() {
	b, err := json.Marshal(r)
	if err != nil {
		return
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_ = unix.Sendto(fd, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: reportSocket})
}
